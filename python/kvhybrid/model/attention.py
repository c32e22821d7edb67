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

from kvhybrid.errors import LayoutError
from kvhybrid.model.page_kernel import NativeAttention
from kvhybrid.model.scored import attend_scored
from kvhybrid.model.triton.attention import TritonAttention

if TYPE_CHECKING:
    from kvhybrid.cache.pages import PageStorage, Piece
    from kvhybrid.cache.quantized import Side
    from kvhybrid.cache.step import Span, Step
    from kvhybrid.model.scored import Extras

# Up to this many new tokens a row, reading pages in place beats gathering them.
FEW_TOKENS = 4
# From this size on keys come from memory and not from a cache, and float32 keys are then read a third
# faster as the left operand of the product.
LEFT_BYTES = 2**22


class _Buffers(threading.local):
    def __init__(self) -> None:
        self.of: dict[tuple[object, ...], torch.Tensor] = {}


class PagedAttention:
    """Attends over the pages of one storage. Holds gather buffers, a pair for each thread that attends."""

    def __init__(self, storage: PageStorage, *, always_gather: bool = False) -> None:
        """``always_gather``: read scattered and neighbouring pages alike, so that sums never depend on it."""
        self.storage = storage
        self._always_gather = always_gather
        self._buffers = _Buffers()
        self.native = None if always_gather else _kernel_for(storage)
        """The kernel that reads few tokens' pages, where there is one for the device."""

    def attend(
        self,
        step: Step,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float | None = None,
        window: int | None = None,
        extras: Extras | None = None,
    ) -> torch.Tensor:
        """Attend causally for every row of the step; its K and V are written first unless that was done.

        ``query`` ``[batch, heads, tokens, head_dim]``; ``key`` and ``value``: the step's own. ``window``: a
        token sees itself and the ``window - 1`` before it. ``extras``: a soft cap or sinks. Returns ``[batch,
        tokens, heads, value_head_dim]`` in the query's dtype, zeros where no row lies. Raises
        ``LayoutError`` for a query, K or V that do not fit the step, or sinks that are not one a head.
        """
        step.check_query(layer, query)
        if extras is not None and extras.sinks is not None and extras.sinks.numel() != query.shape[1]:
            raise LayoutError(f"{extras.sinks.numel()} sinks for {query.shape[1]} query heads")
        scale = _scale(query, scale)
        if self.native is not None and self.native.takes(step, query):
            return self.native.attend(step, layer, query, key, value, scale, window, extras)
        with torch.no_grad():
            return self._attend_rows(step, layer, query, key, value, scale, window, extras)

    def _attend_rows(
        self,
        step: Step,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        extras: Extras | None,
    ) -> torch.Tensor:
        if not step.has(layer):
            step.write(layer, key, value)
        batch, _, tokens, _ = query.shape
        if batch == 1 and len(step.spans) == 1 and step.num_tokens == tokens:
            own = query[0], key[0], value[0]
            return self._attend_row(step.spans[0], layer, *own, scale, window, extras).transpose(0, 1)[None]
        result = step.room_for(query, value.shape[-1])
        for span in step.spans:
            new = slice(span.column, span.column + span.count)
            q, k, v = query[span.row, :, new], key[span.row, :, new], value[span.row, :, new]
            rows = self._attend_row(span, layer, q, k, v, scale, window, extras)
            result[span.row, new] = rows.transpose(0, 1)
        return result

    def _attend_row(
        self,
        span: Span,
        layer: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scale: float,
        window: int | None,
        extras: Extras | None,
    ) -> torch.Tensor:
        """Attend for one row: ``q`` ``[heads, count, head_dim]``, returned with the value width."""
        if extras is not None:
            start = 0 if window is None else max(span.past + 1 - window, 0)
            keys, values = self._gathered(span, layer, start, span.total, q.dtype)
            return attend_scored(q, keys, values, scale, window, extras)
        if window is not None and window < span.total:
            if span.count == 1:
                return self._in_place(span, layer, q, scale, span.total - window)
            return self._masked(span, layer, q, scale, max(span.past + 1 - window, 0), window)
        if span.past == 0 and span.count > 1:
            return functional.scaled_dot_product_attention(
                q[None], k[None], v[None], is_causal=True, scale=scale, enable_gqa=k.shape[0] != q.shape[0]
            )[0]
        if span.count <= FEW_TOKENS:
            return self._in_place(span, layer, q, scale, 0)
        if q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
            return self._merged(span, layer, q, k, v, scale)
        return self._masked(span, layer, q, scale, 0, None)

    def _in_place(self, span: Span, layer: int, q: torch.Tensor, scale: float, start: int) -> torch.Tensor:
        """Attend over ``[start, total)`` reading pages where they lie. ``q`` ``[heads, count, head_dim]``."""
        storage = self.storage
        kv_heads = storage.keys[layer].shape[1]
        heads, count, dim = q.shape
        folded = (q * scale).reshape(kv_heads, heads // kv_heads * count, dim)
        pieces = storage.pieces(span.table, start, span.total, always_gather=self._always_gather)
        keys = [self._view("k", layer, piece, q.dtype) for piece in pieces]
        scores = [_scores(folded, piece) for piece in keys]
        joined = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
        if count > 1:
            seen = torch.arange(start, span.total, device=q.device)
            own = torch.arange(span.past, span.total, device=q.device)
            hidden = seen > own[:, None]
            joined.view(kv_heads, -1, count, len(seen)).masked_fill_(hidden, -math.inf)
        # Softmax in float32: a half's 8 or 11 bits do not hold a sum over thousands of tokens.
        weights = torch.softmax(joined, dim=-1, dtype=torch.float32).to(q.dtype)
        total, done = None, 0
        for piece, score in zip(pieces, scores, strict=True):
            width = score.shape[-1]
            values = self._view("v", layer, piece, q.dtype)
            part = _values(weights[..., done : done + width], values)
            total, done = part if total is None else total.add_(part), done + width
        assert total is not None  # a row has at least the token that attends
        return total.view(heads, count, -1)

    def _view(self, side: Side, layer: int, piece: Piece, dtype: torch.dtype) -> torch.Tensor:
        out = None
        if piece.scattered is not None or piece.mixed is not None:
            pool = self.storage.keys[layer] if side == "k" else self.storage.values[layer]
            out = self._buffer(side, pool, piece.pages)
        return self.storage.view(layer, side, piece, out).to(dtype)

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
        pools = (self.storage.keys[layer], self.storage.values[layer])
        pages = -(-(stop - start) // self.storage.block_size)
        found = []
        for name, pool in zip("kv", pools, strict=True):
            heads, width = pool.shape[1], pool.shape[3]
            room = self._buffer(name, pool, pages).view(-1)[: heads * (stop - start) * width]
            found.append(room.view(heads, stop - start, width))
        self.storage.gather(layer, span.table, start, stop, (found[0], found[1]))
        return found[0].to(dtype), found[1].to(dtype)

    def _buffer(self, name: str, pool: torch.Tensor, pages: int) -> torch.Tensor:
        """Return a reused buffer of ``pages`` pages; it grows by doubling and never shrinks."""
        # Layers alike share a buffer: they attend one behind the other.
        key = name, pool.device, *pool.shape[1:]
        known = self._buffers.of.get(key)
        if known is None or known.shape[0] < pages:
            room = max(pages, 2 * known.shape[0] if known is not None else 0)
            with torch.inference_mode(False):  # or it could not be reused outside of it
                known = torch.empty((room, *pool.shape[1:]), dtype=pool.dtype, device=pool.device)
            self._buffers.of[key] = self.storage.buffers.track(known)
        return known[:pages]


def _kernel_for(storage: PageStorage) -> NativeAttention | TritonAttention | None:
    if NativeAttention.serves(storage):
        return NativeAttention(storage)
    return TritonAttention(storage) if TritonAttention.serves(storage) else None


def decode(
    step: Step,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float | None,
    window: int | None,
    extras: Extras | None = None,
) -> torch.Tensor:
    """Attend for one token a row over contiguous K and V ``[batch, num_kv_heads, columns, width]``.

    ``query`` ``[batch, heads, 1, head_dim]``; returns ``[batch, 1, heads, value_head_dim]``.
    """
    if window is not None and window < keys.shape[2]:
        keys, values = keys[:, :, -window:], values[:, :, -window:]
    if extras is not None:
        result = query.new_zeros((query.shape[0], 1, query.shape[1], values.shape[3]))
        for span in step.spans:
            held = slice(max(keys.shape[2] - span.total, 0), None)
            own = query[span.row], keys[span.row, :, held], values[span.row, :, held]
            result[span.row] = attend_scored(*own, _scale(query, scale), None, extras).transpose(0, 1)
        return result
    rows = functional.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=step.seen(keys.shape[2], query.device),
        scale=scale,
        enable_gqa=keys.shape[1] != query.shape[1],
    )
    return rows.transpose(1, 2)


def _scale(query: torch.Tensor, scale: float | None) -> float:
    return scale if scale is not None else float(query.shape[-1]) ** -0.5


def _scores(folded: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return ``folded @ keys^T``: ``[heads, rows, tokens]`` for a page's part or a run of pages."""
    heads, rows, dim = folded.shape
    if keys.dim() == 3:
        return torch.bmm(folded, keys.transpose(1, 2))
    pages, _, size, _ = keys.shape
    wide = folded.expand(pages, heads, rows, dim).reshape(pages * heads, rows, dim)
    keys = keys.reshape(pages * heads, size, dim)
    if keys.dtype == torch.float32 and keys.nbytes >= LEFT_BYTES:
        scores = torch.bmm(keys, wide.transpose(1, 2)).view(pages, heads, size, rows)
        return scores.permute(1, 3, 0, 2).reshape(heads, rows, pages * size)
    scores = torch.bmm(wide, keys.transpose(1, 2))
    return scores.view(pages, heads, rows, size).permute(1, 2, 0, 3).reshape(heads, rows, pages * size)


def _values(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return ``weights @ values``: ``[heads, rows, width]``."""
    if values.dim() == 3:
        return torch.bmm(weights, values)
    pages, heads, size, width = values.shape
    rows = weights.shape[1]
    split = weights.view(heads, rows, pages, size).permute(2, 0, 1, 3).reshape(pages * heads, rows, size)
    return torch.bmm(split, values.reshape(pages * heads, size, width)).view(pages, heads, rows, width).sum(0)
