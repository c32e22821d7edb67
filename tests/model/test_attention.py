"""Attention over pages against float64 arithmetic, over pages full of NaN wherever nothing was written."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvhybrid.cache.pages import PageStorage, PageTable
from kvhybrid.cache.step import Span, Step
from kvhybrid.errors import LayoutError
from kvhybrid.layout import KVLayout
from kvhybrid.model import attention, scored
from kvhybrid.model.attention import PagedAttention, decode
from kvhybrid.model.scored import Extras

PAGES = 80


class NoPlan:
    """A step that nobody commits."""


def exact(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past: int,
    window: int | None,
    extras: Extras,
) -> torch.Tensor:
    """Causal attention of one row in float64: ``[heads, count, dim]`` over ``[heads, total, dim]``."""
    scores = query.double() @ key.double().transpose(1, 2) / math.sqrt(query.shape[-1])
    if extras.cap is not None:
        scores = extras.cap * torch.tanh(scores / extras.cap)
    own = torch.arange(past, key.shape[1])[:, None]
    seen = torch.arange(key.shape[1])
    hidden = seen > own
    if window is not None:
        hidden |= seen <= own - window
    scores = scores.masked_fill(hidden, -math.inf)
    if extras.sinks is not None:
        scores = torch.cat([scores, extras.sinks.double()[:, None, None].expand(-1, len(own), 1)], dim=-1)
    return scores.softmax(-1)[..., : key.shape[1]] @ value.double()


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
    cap=st.sampled_from([None, None, 0.7]),
    sinks=st.booleans(),
    native=st.booleans(),
    scores_at_once=st.sampled_from([1, 50, 2**24]),
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
    cap: float | None,
    sinks: bool,
    native: bool,
    scores_at_once: int,
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
    extras = Extras(cap, 2 * torch.randn(kv_heads * group) if sinks else None)
    with (
        mock.patch.object(attention, "LEFT_BYTES", 0 if from_memory else 2**40),
        mock.patch.object(scored, "SCORES", scores_at_once),
    ):
        paged = PagedAttention(storage, always_gather=not native)
        given = extras if any(each is not None for each in extras) else None
        found = paged.attend(step, 0, query, new[0], new[1], None, window, given)
    for span, key, value in zip(spans, keys, values, strict=True):
        own = slice(span.column, span.column + span.count)
        wide = (t.repeat_interleave(group, 0) for t in (key, value))
        expected = exact(query[0, :, own], *wide, span.past, window, extras)
        assert torch.allclose(found[0, own].transpose(0, 1).double(), expected, atol=2e-5)


def one_token_each(lengths: list[int]) -> tuple[Step, torch.Tensor, torch.Tensor]:
    """Return a step of one new token a row, left-padded to one length, and its mirrors."""
    layout = KVLayout(num_layers=1, num_kv_heads=2, head_dim=4, block_size=8)
    table = PageTable(torch.arange(4))
    spans = tuple(Span(row, 0, 1, length - 1, table) for row, length in enumerate(lengths))
    step = Step(PageStorage(layout, 4), NoPlan(), spans, torch.arange(len(lengths)))  # type: ignore[arg-type]
    shape = len(lengths), 2, max(lengths), 4
    return step, torch.randn(shape), torch.randn(shape)


@pytest.mark.parametrize("window", [None, 5])
def test_mirrors_are_attended_with_a_cap_and_sinks(window: int | None) -> None:
    lengths = [19, 7, 3]
    step, keys, values = one_token_each(lengths)
    query = torch.randn(3, 6, 1, 4)
    extras = Extras(0.7, torch.randn(6))
    found = decode(step, query, keys, values, None, window, extras)
    for row, length in enumerate(lengths):
        wide = (side[row, :, -length:].repeat_interleave(3, 0) for side in (keys, values))
        expected = exact(query[row], *wide, length - 1, window, extras)
        assert torch.allclose(found[row].transpose(0, 1).double(), expected, atol=1e-6)


def test_sinks_that_are_not_one_a_head_are_refused() -> None:
    step, keys, values = one_token_each([1])
    attention_over_pages = PagedAttention(step.storage)
    with pytest.raises(LayoutError, match="5 sinks for 6 query heads"):
        attention_over_pages.attend(
            step, 0, torch.randn(1, 6, 1, 4), keys, values, None, None, Extras(None, torch.randn(5))
        )
    assert not step.has(0)
