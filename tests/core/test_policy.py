"""Who leaves, and why what is missing is missing, as the pool says."""

from __future__ import annotations

import numpy as np
import pytest

from kvhybrid._core import Batch, PagePool

BLOCK = 4


def text(*blocks: int) -> np.ndarray:
    return np.repeat(np.array(blocks, dtype=np.int32), BLOCK)


def store(pool: PagePool, tokens: np.ndarray, namespace: int = 0) -> None:
    sequence = pool.open(np.append(tokens, np.int32(7)), namespace)
    batch = Batch(pool, [sequence])
    batch.plan(np.array([sequence.pending - 1], dtype=np.int32)).commit()
    sequence.close()


@pytest.fixture(params=["lru", "adaptive"])
def pool(request) -> PagePool:
    pool = PagePool(8, BLOCK, policy=request.param, seed=1)
    pool.set_time(1_000_000)
    return pool


def test_what_is_missing_was_never_seen_or_goes_on_differently_or_was_evicted(pool):
    nothing = {"cached": 0, "evicted": 0, "evicted_by": None, "evicted_s_ago": None}
    assert pool.explain(text(1, 2)) == {**nothing, "unseen": 2 * BLOCK}
    store(pool, text(1, 2, 3))
    assert pool.explain(text(1, 2, 3)) == {**nothing, "cached": 3 * BLOCK, "unseen": 0}
    assert pool.explain(text(1, 2, 5, 6)) == {**nothing, "cached": 2 * BLOCK, "unseen": 2 * BLOCK}
    assert pool.explain(text(1, 2, 3), namespace=5) == {**nothing, "unseen": 3 * BLOCK}
    pool.set_time(3_000_000)
    assert pool.evict(2) == 2
    pool.set_time(5_500_000)
    assert pool.explain(text(1, 2, 3, 4)) == {
        "cached": BLOCK,
        "evicted": 2 * BLOCK,
        "unseen": BLOCK,
        "evicted_by": "asked",
        "evicted_s_ago": pytest.approx(2.5),
    }


def test_room_is_made_by_whoever_rules_and_what_returns_is_counted(pool):
    store(pool, text(1, 2, 3))
    for other in (10, 20, 30):
        store(pool, text(other, other + 1, other + 2))
    found = pool.explain(text(1, 2, 3))
    assert (found["cached"], found["evicted"], found["evicted_by"]) == (0, 3 * BLOCK, "lru")
    before = pool.statistics()
    assert before["returned_pages"] == 0
    assert before["ghosts"] == before["evicted_pages"] == 4
    store(pool, text(1, 2, 3))
    after = pool.statistics()
    assert after["returned_pages"] == 3
    assert after["ghosts"] == after["evicted_pages"] - 3
    assert pool.explain(text(1, 2, 3))["cached"] == 3 * BLOCK
    pool.check()


def test_a_part_of_a_block_that_was_left_behind_is_explained_too(pool):
    sequence = pool.open(np.array([1, 1, 1, 1, 2, 2, 9], dtype=np.int32))
    Batch(pool, [sequence]).plan(np.array([6], dtype=np.int32)).commit()
    sequence.close()
    assert pool.explain(np.array([1, 1, 1, 1, 2, 2], dtype=np.int32))["cached"] == 6
    pool.evict(8)
    found = pool.explain(np.array([1, 1, 1, 1, 2, 2], dtype=np.int32))
    assert (found["evicted"], found["unseen"]) == (6, 0)


def test_who_rules_is_said():
    assert PagePool(8, BLOCK).rule() == {"ruling": "lru"}
    rule = PagePool(8, BLOCK, policy="adaptive").rule()
    assert rule == {
        "ruling": "lru",
        "shadow_hit_rate_lru": 0.0,
        "shadow_hit_rate_survival": 0.0,
        "rule_changes": 0,
        "lessons": 0,
    }
    with pytest.raises(ValueError, match="'fifo'"):
        PagePool(8, BLOCK, policy="fifo")


def test_learning_goes_on_beside_and_arrives():
    pool = PagePool(64, BLOCK, policy="adaptive")
    for round_ in range(4000):
        store(pool, text(round_ % 50, 1000 + round_ % 7))
        if pool.rule()["lessons"]:
            break
    assert pool.rule()["lessons"] > 0
    pool.check()
