"""Attention over pages in plain torch, with the query group folded into the query axis.

A query head's group shares K and V, so ``[heads, tokens]`` of one group fold into one axis and K and V
are never expanded (``transformers`` expands them whenever there is a mask). One decode token reads the
pages where they lie: a run of consecutive pages is one batched matmul over ``pages x heads``. Longer
suffixes gather their past once into a reused buffer and merge two partial attentions by their
log-sum-exp (flash decoding; Dao et al. 2023), so that no dense mask is ever built.
"""

from __future__ import annotations

import math
import threading
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from kvhybrid.cache.pages import MAX_RUNS, partial_blocks

if TYPE_CHECKING:
    from kvhybrid.cache.pages import PageStorage
    from kvhybrid.cache.step import Span, Step

# Up to this many new tokens a row, reading pages in place beats gathering them.
FEW_TOKENS = 4


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.of: dict[str, torch.Tensor] = {}


class PagedAttention:
    """Attends over the pages of one storage. Holds gather buffers, a pair for each thread that attends."""

    def __init__(self, storage: PageStorage) -> None:
        self.storage = storage
        self._buffers = _Buffers()

    def attend(
        self,
        step: Step,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """Attend causally for every row of the step, whose K and V were written before.

        ``query`` ``[batch, heads, tokens, head_dim]``; ``key`` and ``value``: the step's own, as they were
        written. ``window``: a token sees itself and the ``window - 1`` before it. Returns
        ``[batch, tokens, heads, value_head_dim]`` in the query's dtype, zeros where no row lies.
        """
        batch, heads, tokens, _ = query.shape
        scale = scale if scale is not None else query.shape[-1] ** -0.5
        out = query.new_zeros if step.num_tokens < batch * tokens else query.new_empty
        result = out((batch, tokens, heads, value.shape[-1]))
        for span in step.spans:
            new = slice(span.column, span.column + span.count)
            q, k, v = query[span.row, :, new], key[span.row, :, new], value[span.row, :, new]
            if window is not None and window < span.total:
                rows = self._windowed(span, layer, q, scale, window)
            elif span.past == 0 and span.count > 1:
                rows = functional.scaled_dot_product_attention(
                    q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=k.shape[0] != heads
                )[0]
            elif span.count <= FEW_TOKENS:
                rows = self._in_place(span, layer, q, scale, 0)
            elif q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
                rows = self._merged(span, layer, q, k, v, scale)
            else:
                rows = self._masked(span, layer, q, scale, 0, None)
            result[span.row, new] = rows.transpose(0, 1)
        return result

    def _windowed(self, span: Span, layer: int, q: torch.Tensor, scale: float, window: int) -> torch.Tensor:
        if span.count == 1:
            return self._in_place(span, layer, q, scale, span.total - window)
        return self._masked(span, layer, q, scale, max(span.past + 1 - window, 0), window)

    def _in_place(self, span: Span, layer: int, q: torch.Tensor, scale: float, start: int) -> torch.Tensor:
        """Attend over ``[start, total)`` reading pages where they lie. ``q`` ``[heads, count, head_dim]``."""
        storage, kv_heads = self.storage, self.storage.layout.num_kv_heads
        heads, count, dim = q.shape
        folded = (q * scale).reshape(kv_heads, heads // kv_heads * count, dim)
        pieces = list(self._pieces(span, layer, start, q.dtype))
        scores = torch.cat([_scores(folded, keys) for keys, _ in pieces], dim=-1)
        if count > 1:
            past = torch.arange(scores.shape[-1], device=q.device) + start
            own = torch.arange(count, device=q.device) + span.past
            hidden = past[None] > own[:, None]
            scores.view(kv_heads, -1, count, scores.shape[-1]).masked_fill_(hidden, -math.inf)
        # Softmax in float32: a half's 8 or 11 bits do not hold a sum over thousands of tokens.
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        widths = [keys.shape[-2] * (keys.shape[0] if keys.dim() == 4 else 1) for keys, _ in pieces]
        parts = [
            _values(w, values) for w, (_, values) in zip(weights.split(widths, dim=-1), pieces, strict=True)
        ]
        total = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        return total.view(heads, count, storage.layout.value_head_dim)

    def _pieces(
        self, span: Span, layer: int, start: int, dtype: torch.dtype
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return views that cover ``[start, total)``, in order.

        ``[heads, tokens, width]`` of one page's part, ``[pages, heads, block_size, width]`` of a run.
        """
        size = self.storage.block_size
        pools = self.storage.keys[layer], self.storage.values[layer]
        low, high = -(-start // size), span.total // size
        edges = {i: (a, b) for i, a, b in partial_blocks(start, span.total, size)}
        found: list[tuple[torch.Tensor, torch.Tensor]] = []

        def edge(index: int) -> None:
            first, last = edges[index]
            page = int(span.table.ids[index])
            found.append((pools[0][page][:, first:last], pools[1][page][:, first:last]))

        if start // size in edges and start // size < low:
            edge(start // size)
        if low < high:
            runs = span.table.runs(low, high)
            if len(runs) > MAX_RUNS:
                chosen = self.storage.to_device(span.table.ids[low:high])
                found.append(
                    (
                        torch.index_select(pools[0], 0, chosen, out=self._buffer("k", pools[0], high - low)),
                        torch.index_select(pools[1], 0, chosen, out=self._buffer("v", pools[1], high - low)),
                    )
                )
            else:
                found.extend((pools[0][p : p + n], pools[1][p : p + n]) for p, n in runs)
        if high in edges and high >= low:
            edge(high)
        if dtype != self.storage.dtype:
            return [(keys.to(dtype), values.to(dtype)) for keys, values in found]
        return found

    def _merged(
        self, span: Span, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attend to the gathered past without a mask and to the new tokens causally; merge the two."""
        keys, values = self._gathered(span, layer, 0, span.past, q.dtype)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        past, past_sum = flash(q[None], keys[None], values[None], 0.0, False, scale=scale)
        new, new_sum = flash(q[None], k[None], v[None], 0.0, True, scale=scale)
        share = torch.sigmoid(past_sum - new_sum).unsqueeze(-1)
        merged = torch.lerp(new.float(), past.float(), share)
        return merged[0].to(q.dtype)

    def _masked(
        self, span: Span, layer: int, q: torch.Tensor, scale: float, start: int, window: int | None
    ) -> torch.Tensor:
        """Attend over the gathered tokens ``[start, total)`` under a mask, the query group folded."""
        keys, values = self._gathered(span, layer, start, span.total, q.dtype)
        heads, count, dim = q.shape
        past = torch.arange(start, span.total, device=q.device)
        own = torch.arange(span.past, span.total, device=q.device)[:, None]
        seen = past <= own
        if window is not None:
            seen &= past > own - window
        group = heads // keys.shape[0]
        folded = q.reshape(1, keys.shape[0], group * count, dim)
        mask = seen.repeat(group, 1)
        rows = functional.scaled_dot_product_attention(
            folded, keys[None], values[None], attn_mask=mask, scale=scale
        )
        return rows.view(heads, count, values.shape[-1])

    def _gathered(
        self, span: Span, layer: int, start: int, stop: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layout, pools = self.storage.layout, (self.storage.keys[layer], self.storage.values[layer])
        pages = -(-(stop - start) // layout.block_size)
        found = []
        for name, pool in zip("kv", pools, strict=True):
            room = self._buffer(name, pool, pages).view(-1)
            width = pool.shape[-1]
            room = room[: layout.num_kv_heads * (stop - start) * width]
            found.append(room.view(layout.num_kv_heads, stop - start, width))
        self.storage.gather(layer, span.table, start, stop, (found[0], found[1]))
        return found[0].to(dtype), found[1].to(dtype)

    def _buffer(self, name: str, pool: torch.Tensor, pages: int) -> torch.Tensor:
        """Return a reused buffer of ``pages`` pages; it grows by doubling and never shrinks."""
        known = self._buffers.of.get(name)
        if known is None or known.shape[0] < pages:
            room = max(pages, 2 * known.shape[0] if known is not None else 0)
            known = torch.empty((room, *pool.shape[1:]), dtype=pool.dtype, device=pool.device)
            self._buffers.of[name] = known
        return known[:pages]


def _scores(folded: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return ``folded @ keys^T``: ``[heads, rows, tokens]`` for a page's part or a run of pages."""
    heads, rows, dim = folded.shape
    if keys.dim() == 3:
        return torch.bmm(folded, keys.transpose(1, 2))
    pages, _, size, _ = keys.shape
    wide = folded.expand(pages, heads, rows, dim).reshape(pages * heads, rows, dim)
    scores = torch.bmm(wide, keys.reshape(pages * heads, size, dim).transpose(1, 2))
    return scores.view(pages, heads, rows, size).permute(1, 2, 0, 3).reshape(heads, rows, pages * size)


def _values(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return ``weights @ values``: ``[heads, rows, width]``."""
    if values.dim() == 3:
        return torch.bmm(weights, values)
    pages, heads, size, width = values.shape
    rows = weights.shape[1]
    split = weights.view(heads, rows, pages, size).permute(2, 0, 1, 3).reshape(pages * heads, rows, size)
    return torch.bmm(split, values.reshape(pages * heads, size, width)).view(pages, heads, rows, width).sum(0)
