"""Attention over pages against float64 arithmetic, over pages full of NaN wherever nothing was written."""

from __future__ import annotations

import math
from unittest import mock

import torch
from hypothesis import given
from hypothesis import strategies as st

from kvhybrid.cache.pages import PageStorage, PageTable
from kvhybrid.cache.step import Span, Step
from kvhybrid.layout import KVLayout
from kvhybrid.model import attention
from kvhybrid.model.attention import PagedAttention

PAGES = 80


class NoPlan:
    """A step that nobody commits."""


def exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, past: int, window: int | None
) -> torch.Tensor:
    """Causal attention of one row in float64: ``[heads, count, dim]`` over ``[heads, total, dim]``."""
    scores = query.double() @ key.double().transpose(1, 2) / math.sqrt(query.shape[-1])
    own = torch.arange(past, key.shape[1])[:, None]
    seen = torch.arange(key.shape[1])
    hidden = seen > own
    if window is not None:
        hidden |= seen <= own - window
    return scores.masked_fill(hidden, -math.inf).softmax(-1) @ value.double()


@given(
    block_size=st.sampled_from([1, 2, 4, 8, 16]),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dim=st.sampled_from([4, 8]),
    rows=st.lists(st.tuples(st.integers(0, 23), st.integers(1, 11)), min_size=1, max_size=3),
    decode=st.booleans(),
    window=st.sampled_from([None, None, 3, 7]),
    seed=st.integers(0, 2**16),
    scattered=st.booleans(),
    storage_dtype=st.sampled_from(["float32", "float32", "float16"]),
    from_memory=st.booleans(),
)
def test_attention_over_pages_equals_exact_arithmetic(
    block_size: int,
    heads: tuple[int, int],
    dim: int,
    rows: list[tuple[int, int]],
    decode: bool,
    window: int | None,
    seed: int,
    scattered: bool,
    storage_dtype: str,
    from_memory: bool,
) -> None:
    torch.manual_seed(seed)
    kv_heads, group = heads
    layout = KVLayout(
        num_layers=1, num_kv_heads=kv_heads, head_dim=dim, block_size=block_size, dtype=storage_dtype
    )
    storage = PageStorage(layout, PAGES * 3)
    for pages in (*storage.keys, *storage.values):
        pages.fill_(math.nan)
    free = torch.randperm(PAGES * 3) if scattered else torch.arange(PAGES * 3)
    spans, keys, values, slots, column = [], [], [], [], 0
    for past, wanted in rows:
        count = 1 if decode else wanted
        total = past + count
        num_pages = -(-total // block_size)
        table, free = PageTable(free[:num_pages]), free[num_pages:]
        span = Span(0, column, count, past, table)
        key, value = (torch.randn(kv_heads, total, dim).to(storage.dtype).float() for _ in range(2))
        if past:
            storage.write_run(0, table, 0, key[:, :past], value[:, :past])
        slots += [int(table.ids[p // block_size]) * block_size + p % block_size for p in range(past, total)]
        spans.append(span)
        keys.append(key)
        values.append(value)
        column += count
    step = Step(storage, NoPlan(), tuple(spans), torch.tensor(slots))  # type: ignore[arg-type]
    new = [
        torch.cat([t[:, s.past :] for t, s in zip(side, spans, strict=True)], dim=1)[None]
        for side in (keys, values)
    ]
    step.write(0, new[0], new[1])
    query = torch.randn(1, kv_heads * group, column, dim)
    with mock.patch.object(attention, "LEFT_BYTES", 0 if from_memory else 2**40):
        found = PagedAttention(storage).attend(step, 0, query, new[0], new[1], None, window)
    for span, key, value in zip(spans, keys, values, strict=True):
        own = slice(span.column, span.column + span.count)
        wide = (t.repeat_interleave(group, 0) for t in (key, value))
        expected = exact(query[0, :, own], *wide, span.past, window)
        assert torch.allclose(found[0, own].transpose(0, 1).double(), expected, atol=2e-5)
