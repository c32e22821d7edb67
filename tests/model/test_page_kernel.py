"""What reaches the native attention kernel fits the step: it reads and writes memory by address."""

from __future__ import annotations

import pytest
import torch

from kvhybrid.cache.pages import PageStorage, PageTable
from kvhybrid.cache.step import Span, Step
from kvhybrid.errors import LayoutError
from kvhybrid.layout import KVLayout
from kvhybrid.model.attention import PagedAttention
from kvhybrid.model.interface import reading_pages
from kvhybrid.model.page_kernel import NativeAttention
from kvhybrid.model.routes import PagedReader

HEADS, DIM = 2, 8


class NoPlan:
    """A step that nobody commits."""


def attention_over(count: int, column: int = 0) -> tuple[PagedAttention, NativeAttention, Step]:
    """Return attention over empty pages, its kernel, and a step of ``count`` new tokens in one row."""
    layout = KVLayout(num_layers=1, num_kv_heads=HEADS, head_dim=DIM, block_size=4, dtype="float32")
    storage = PageStorage(layout, 8)
    span = Span(0, column, count, 0, PageTable(torch.arange(4)))
    step = Step(storage, NoPlan(), (span,), torch.arange(count))  # type: ignore[arg-type]
    paged = PagedAttention(storage)
    assert isinstance(paged.native, NativeAttention)
    return paged, paged.native, step


def states(tokens: int, *, rows: int = 1, dim: int = DIM) -> torch.Tensor:
    """Return random K, V or queries."""
    return torch.randn(rows, HEADS, tokens, dim)


@pytest.mark.parametrize(
    "query",
    [states(2), states(3, rows=0), states(3, dim=4), states(3, dim=16)],
    ids=["fewer tokens", "no row", "narrower", "wider"],
)
def test_a_query_that_does_not_fit_the_step_is_refused_and_nothing_written(
    query: torch.Tensor,
) -> None:
    paged, _, step = attention_over(3)
    with pytest.raises(LayoutError, match="query"):
        paged.attend(step, 0, query, states(3), states(3))
    assert not step.has(0)


@pytest.mark.parametrize(("count", "column"), [(3, 0), (1, 2)])
def test_a_single_token_of_k_and_v_is_refused_where_the_step_reaches_further(count: int, column: int) -> None:
    _, native, step = attention_over(count, column)
    with pytest.raises(LayoutError, match="the step needs"):
        native.writes(step, 0, states(1), states(1))


def test_values_that_changed_their_shape_since_the_layer_handed_them_over_are_refused() -> None:
    paged, native, step = attention_over(3)
    key = states(3)
    assert native.writes(step, 0, key, states(3))
    with pytest.raises(LayoutError):
        paged.attend(step, 0, states(3), key, states(3, dim=4))


def test_k_and_v_of_another_dtype_are_converted_on_their_way_into_pages() -> None:
    paged, _, step = attention_over(3)
    key, value = states(3).bfloat16(), states(3).bfloat16()
    paged.attend(step, 0, states(3), key, value)
    assert torch.equal(paged.storage.keys[0][0, :, :3], key[0].float())
    assert torch.equal(paged.storage.values[0][0, :, :3], value[0].float())


def test_the_answer_lies_beside_the_query_whatever_the_default_device_is() -> None:
    paged, _, step = attention_over(1)
    query, key, value = states(1), states(1), states(1)
    with torch.device("meta"):
        answer = paged.attend(step, 0, query, key, value)
    assert torch.allclose(answer, value.transpose(1, 2))


def test_a_layer_that_hands_over_k_and_v_again_attends_to_the_new_ones() -> None:
    paged, _, step = attention_over(3)
    reader = PagedReader(paged)
    query, first, second = states(3), (states(3), states(3)), (states(3), states(3))
    with reading_pages(True):
        reader.read(step, 0, *first)
        paged.attend(step, 0, query, *first)
        reader.read(step, 0, *second)
        found = paged.attend(step, 0, query, *second)
    expected = torch.nn.functional.scaled_dot_product_attention(query, *second, is_causal=True)
    assert torch.allclose(found, expected.transpose(1, 2), atol=1e-5)
