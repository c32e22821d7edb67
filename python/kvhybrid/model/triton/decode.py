"""Launching the kernels: shapes and splits are chosen here, memory for partial results is taken here."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from kvhybrid.model.triton.kernels import attend_kernel, merge_kernel

if TYPE_CHECKING:
    from kvhybrid.model.triton.plan import DecodePlan, Works

MOST_PARTS = 64
LEAST_TOKENS = 256
"""Tokens that a part has at least: below that the merge costs more than waiting."""
CHUNK = 16
"""Parts that the merge reads at once."""
PROGRAMS_EACH = 4
"""Programs a multiprocessor: enough that some load while others compute."""


class Records(NamedTuple):
    """One class of quantized pages of one layer: uint8 ``[pages, num_kv_heads, bytes]``, K and V."""

    bits: int
    keys: torch.Tensor
    values: torch.Tensor


class LayerPages(NamedTuple):
    """One layer's pages: ids count through ``keys``, then through each class of records (two at most)."""

    keys: torch.Tensor
    values: torch.Tensor
    records: tuple[Records, ...] = ()


class Launch(NamedTuple):
    """A kernel with all that it is launched with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    def run(self) -> None:
        """Start it on the current stream."""
        self.kernel[self.grid](**self.arguments, **self.options)


def decode(
    plan: DecodePlan,
    pages: LayerPages,
    query: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    *,
    window: int | None = None,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attend causally for the plan's rows, whose K and V were written before.

    ``query`` ``[batch, heads, tokens, head_dim]``, the last dimension contiguous; ``out`` ``[batch, tokens,
    heads, value_head_dim]``, of which only the rows' own tokens are written. ``window`` as the plan was made
    with; ``cap``: scores become ``cap * tanh(score / cap)``; ``sinks`` ``[heads]``: one more logit a head,
    which takes weight and gives nothing.
    """
    for launch in launches(plan, pages, query, out, scale, window=window, cap=cap, sinks=sinks):
        launch.run()


def launches(
    plan: DecodePlan,
    pages: LayerPages,
    query: torch.Tensor,
    out: torch.Tensor,
    scale: float,
    *,
    window: int | None,
    cap: float | None,
    sinks: torch.Tensor | None,
    processors: int | None = None,
) -> list[Launch]:
    """Return the launches that ``decode`` runs, in order. ``processors``: as many to fill, not its own."""
    num_pages, kv_heads, block, head_dim = pages.keys.shape
    value_dim = pages.values.shape[3]
    group = query.shape[1] // kv_heads
    spans, row_width = plan.rows.shape
    queries = group * plan.count
    processors = processors or _processors(query.device)
    exact = query.dtype == torch.float32
    # Some pointer must be passed for a class that is not there; it is never read.
    none = Records(0, pages.keys, pages.values)
    first, second = (*pages.records, none, none)[:2]
    most_queries, tile = _sizes(max(head_dim, value_dim), exact=exact, classes=len(pages.records))
    if pages.records:
        tile = min(tile, block)  # a tile of records lies within one page

    stages, num_parts = [], 0
    for works in (plan.shared, plan.own):
        if works is not None:
            at_once = max(16, min(most_queries, _power(works.most_spans * queries)))
            blocks = -(-works.most_spans * queries // at_once)
            parts = _parts(works, blocks * kv_heads, processors)
            stages.append((works, at_once, blocks, num_parts, parts))
            num_parts += parts
    partial = query.new_empty((num_parts, spans, kv_heads, queries, value_dim), dtype=torch.float32)
    sums = query.new_empty((num_parts, spans, kv_heads, queries), dtype=torch.float32)
    shape = {"KV_HEADS": kv_heads, "GROUP": group, "VALUE_DIM": value_dim, "VALUE_WIDE": _wide(value_dim)}
    read = {
        "query": query,
        "keys": pages.keys,
        "values": pages.values,
        "keys_1": first.keys,
        "values_1": first.values,
        "keys_2": second.keys,
        "values_2": second.values,
        "rows": plan.rows,
        "parts": partial,
        "part_sums": sums,
        "query_row": query.stride(0),
        "query_head": query.stride(1),
        "query_token": query.stride(2),
        "first_1": num_pages,
        "first_2": num_pages + len(first.keys),
        "row_width": row_width,
        "all_spans": spans,
        "count": plan.count,
        "window": window or 0,
        "scale": scale,
        "cap": cap or 0.0,
        **shape,
        "HEAD_DIM": head_dim,
        "WIDE": _wide(head_dim),
        "BLOCK": block,
        "TILE": tile,
        "BITS_1": first.bits,
        "BITS_2": second.bits,
        "KEY_BYTES_1": first.keys.shape[-1],
        "KEY_BYTES_2": second.keys.shape[-1],
        "VALUE_BYTES_1": first.values.shape[-1],
        "VALUE_BYTES_2": second.values.shape[-1],
        "TERMS": 3 if exact else 2,
        "PRECISION": "ieee" if exact else "tf32",
        "HAS_WINDOW": window is not None,
        "HAS_CAP": cap is not None,
    }
    found = []
    for works, at_once, blocks, first_part, parts in stages:
        own = {
            "works": works.table,
            "blocks_of_queries": blocks,
            "first_part": first_part,
            "QUERIES": at_once,
        }
        warps = 4 if at_once == 16 and not (exact and max(head_dim, value_dim) > 128) else 8
        options = {"num_warps": warps, "num_stages": 2, "enable_fp_fusion": True}
        found.append(Launch(attend_kernel, (len(works) * blocks, kv_heads, parts), read | own, options))
    merge = {
        "parts": partial,
        "part_sums": sums,
        "rows": plan.rows,
        "sinks": sums if sinks is None else sinks,
        "out": out,
        "out_row": out.stride(0),
        "out_token": out.stride(1),
        "out_head": out.stride(2),
        "row_width": row_width,
        "all_spans": spans,
        "count": plan.count,
        "shared_parts": 0 if plan.shared is None else stages[0][-1],
        "num_parts": num_parts,
        **shape,
        "CHUNK": CHUNK,
        "HAS_SINKS": sinks is not None,
    }
    options = {"num_warps": 2, "num_stages": 1, "enable_fp_fusion": True}
    return [*found, Launch(merge_kernel, (spans * plan.count, query.shape[1]), merge, options)]


def _parts(works: Works, programs: int, processors: int) -> int:
    """Return how many parts fill the device: each of at least ``LEAST_TOKENS`` tokens."""
    wanted = -(-PROGRAMS_EACH * processors // (len(works) * programs))
    return max(1, min(wanted, works.most_tokens // LEAST_TOKENS, MOST_PARTS))


def _sizes(width: int, *, exact: bool, classes: int) -> tuple[int, int]:
    """Return the queries and the tokens that a program holds at once: as many as fit its registers.

    Chosen with ``benches/peers/triton_build.py``, which reports registers and spills of each variant.
    """
    wide = _wide(width)
    if exact:
        return 16, 16
    cost = wide << classes
    return 32 if classes else 64, 64 if cost <= 128 else 32 if cost <= 256 else 16


def _wide(width: int) -> int:
    return max(16, _power(width))


def _power(number: int) -> int:
    """Return the least power of two that is not below ``number``."""
    return 1 << (number - 1).bit_length()


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
