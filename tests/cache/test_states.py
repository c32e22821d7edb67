"""States behind pages: found by page, dropped when the page is written, within their bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvhybrid import ConfigError, KVCacheConfig, KVLayout
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.cache.shares import divide
from kvhybrid.cache.states import PageStates
from kvhybrid.cache.step import Step
from kvhybrid.layout import LayerShape

KEPT = LayerShape(num_kv_heads=2, head_dim=8, value_head_dim=8)
UNIT = 64  # bytes of a state of one unit


def state(units: int, value: float = 0.0) -> tuple[torch.Tensor | None, ...]:
    return torch.full((units, UNIT // 4), value), None


def layout(state_bytes: int = 1000, **changes: object) -> KVLayout:
    return KVLayout.of_layers([KEPT, None], block_size=16, state_bytes=state_bytes, **changes)  # type: ignore[arg-type]


@given(
    st.integers(1, 6),
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(0, 5), st.integers(1, 4)),
            st.tuples(st.just("get"), st.integers(0, 5), st.just(0)),
            st.tuples(st.just("drop"), st.integers(0, 5), st.just(0)),
        ),
        max_size=40,
    ),
)
def test_states_are_what_was_put_last_within_the_bound_the_oldest_leaving_first(
    capacity: int, calls: list[tuple[str, int, int]]
) -> None:
    states = PageStates(capacity * UNIT)
    naive: dict[int, tuple[torch.Tensor | None, ...]] = {}
    for call, page, units in calls:
        if call == "put":
            made = state(units)
            states.put(page, made)
            naive.pop(page, None)
            if units <= capacity:
                naive[page] = made
            while sum(len(kept[0]) for kept in naive.values()) > capacity:  # type: ignore[arg-type]
                del naive[next(iter(naive))]
        elif call == "get":
            found = states.get(page)
            assert found is naive.get(page)
            if page in naive:
                naive[page] = naive.pop(page)
        else:
            states.drop([page])
            naive.pop(page, None)
        assert [page for page in range(6) if page in states] == sorted(naive)
        used = sum(len(kept[0]) for kept in naive.values()) * UNIT  # type: ignore[arg-type]
        assert states.used_bytes == states.statistics()["state_bytes"] == used <= capacity * UNIT


def test_a_state_used_again_outlives_one_that_was_not() -> None:
    states = PageStates(2 * UNIT)
    states.put(1, state(1))
    states.put(2, state(1))
    assert states.touch(1)
    states.put(3, state(1))
    assert [page for page in (1, 2, 3) if page in states] == [1, 3]
    assert not states.touch(2)
    assert states.statistics()["evicted_states"] == 1


def test_a_page_that_is_written_loses_its_state() -> None:
    cache = KVCache(KVCacheConfig(max_tokens=64, block_size=16), layout=layout())
    states = cache.storage.states
    assert states is not None
    from kvhybrid._core import Batch

    row = cache.pool.open(torch.arange(20, dtype=torch.int32).numpy())
    batch = Batch(cache.pool, [row])
    for page in range(4):
        states.put(page, state(1))
    step = Step.plan(cache.storage, batch)
    written = set(step.spans[0].table.ids.tolist())
    assert len(written) == 2
    assert {page for page in range(4) if page in states} == set(range(4)) - written


def test_clearing_the_cache_clears_its_states() -> None:
    cache = KVCache(KVCacheConfig(max_tokens=64, block_size=16), layout=layout())
    assert cache.storage.states is not None
    cache.storage.states.put(0, state(1))
    assert cache.get_stats()["states"] == 1
    cache.clear()
    assert cache.get_stats()["states"] == cache.get_stats()["state_bytes"] == 0


def test_a_cache_without_such_layers_has_no_states_and_says_nothing_of_them() -> None:
    cache = KVCache(KVCacheConfig(max_tokens=64, block_size=16), layout=layout(0))
    assert cache.storage.states is None
    assert "states" not in cache.get_stats()


@pytest.mark.parametrize("state_bytes", [1, 1000, 70_000])
@pytest.mark.parametrize("share", [None, 0.25])
@pytest.mark.parametrize("budget", [None, 1.0])
def test_pages_and_states_share_the_budget(
    state_bytes: int, share: float | None, budget: float | None
) -> None:
    config = KVCacheConfig(max_tokens=4096, block_size=16, max_memory_mb=budget, state_memory_mb=share)
    shape = layout(state_bytes)
    pages, _, capacity = divide(config, shape)
    assert capacity >= state_bytes
    if budget is not None:
        assert pages * shape.bytes_per_page + capacity <= budget * 2**20
        assert capacity == 2**18
    elif share is not None:
        assert (pages, capacity) == (256, 2**18)
    else:
        assert pages == 256
        assert capacity == max(256 * shape.bytes_per_page, 16 * state_bytes)


def test_a_budget_that_holds_no_state_or_no_page_is_refused_with_the_numbers() -> None:
    shape = layout(2**20)
    with pytest.raises(ConfigError, match=r"max_memory_mb=2\.0\) hold no state of 1048576 bytes"):
        divide(KVCacheConfig(max_tokens=64, block_size=16, max_memory_mb=2), shape)
    with pytest.raises(ConfigError, match=r"state_memory_mb=0\.5.* hold no state"):
        divide(KVCacheConfig(max_tokens=64, block_size=16, state_memory_mb=0.5), shape)
    with pytest.raises(ConfigError, match="leaves nothing of max_memory_mb"):
        divide(KVCacheConfig(max_tokens=64, block_size=16, max_memory_mb=2, state_memory_mb=2), shape)


def test_room_for_states_that_no_layer_keeps_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"state_memory_mb=1.0: says nothing"):
        divide(KVCacheConfig(state_memory_mb=1), layout(0))


def test_layouts_differ_by_what_layers_keep_of_a_whole_text() -> None:
    assert layout(8).fingerprint != layout(0).fingerprint != layout(16).fingerprint
    assert layout(0).fingerprint == KVLayout.of_layers([KEPT, None], block_size=16).fingerprint
