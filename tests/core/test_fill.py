"""The buffers that a plan is written to."""

import numpy as np
import pytest
from native import ids

from kvhybrid._core import (
    Batch,
    TokenBuffer,
)


@pytest.fixture
def victims(pool, compute):
    """A pool full of one cold text, and a plan that needs two of its pages."""
    cold = pool.open(np.arange(32, dtype=np.int32))
    compute(pool, cold)
    cold.close()
    first, second = pool.open(ids(90, 91, 92)), pool.open(ids(80, 81))
    plan = Batch(pool, [first, second]).plan()
    assert (plan.num_tokens, plan.num_evicted, plan.max_pages) == (5, 2, 1)
    return plan, (first, second)


def read_only(buffer):
    buffer.flags.writeable = False
    return buffer


@pytest.mark.parametrize(
    ("which", "wrong", "kind", "says"),
    [
        ("tables", np.zeros((2, 1), np.int64), TypeError, "tables must hold int32, not items of format"),
        ("slots", np.zeros(5, np.int64), TypeError, "slots must hold int32, not items of format"),
        (
            "lengths",
            np.zeros((2, 2), np.float32),
            TypeError,
            "lengths must hold int32, not items of format 'f'",
        ),
        ("slots", np.zeros(5, np.uint32), TypeError, "slots must hold int32, not items of format 'I'"),
        ("slots", [0] * 5, TypeError, "slots must be a buffer of integers, not <class 'list'>"),
        ("slots", TokenBuffer(ids(0, 0, 0, 0, 0)), TypeError, "slots must be a buffer of integers"),
        ("tables", np.zeros(2, np.int32), ValueError, "tables must have 2 dimensions, not 1"),
        ("tables", np.zeros((1, 1), np.int32), ValueError, "tables rows must hold at least 2, not 1"),
        ("tables", np.zeros((2, 0), np.int32), ValueError, "tables width must hold at least 1, not 0"),
        ("slots", np.zeros((5, 1), np.int32), ValueError, "slots must have 1 dimensions, not 2"),
        ("slots", np.zeros(4, np.int32), ValueError, "slots must hold at least 5, not 4"),
        ("slots", np.zeros(10, np.int32)[::2], ValueError, "slots must be writable and contiguous"),
        ("lengths", np.zeros(4, np.int32), ValueError, "lengths must have 2 dimensions, not 1"),
        ("lengths", np.zeros((1, 2), np.int32), ValueError, "lengths must hold at least 4, not 2"),
        ("lengths", np.zeros((4, 1), np.int32), ValueError, "lengths must be 2 wide, not 1"),
        ("lengths", np.zeros((2, 2), np.int32).T[:, :1], ValueError, "lengths must be"),
        (
            "tables",
            read_only(np.zeros((2, 1), np.int32)),
            ValueError,
            "tables must be writable and contiguous",
        ),
        ("slots", read_only(np.zeros(5, np.int32)), ValueError, "slots must be writable and contiguous"),
        (
            "lengths",
            read_only(np.zeros((2, 2), np.int32)),
            ValueError,
            "lengths must be writable and contiguous",
        ),
        ("slots", bytes(20), TypeError, "slots must"),
    ],
)
def test_a_buffer_that_fill_cannot_use_changes_nothing(which, wrong, kind, says, pool, victims):
    plan, _ = victims
    good = {
        "tables": np.full((2, 1), -1, np.int32),
        "slots": np.full(5, -1, np.int32),
        "lengths": np.full((2, 2), -1, np.int32),
    }
    before = pool.statistics()
    with pytest.raises((TypeError, ValueError)) as raised:
        plan.fill(**{**good, which: wrong})
    assert says in str(raised.value)
    if not isinstance(wrong, bytes):
        assert raised.type is kind
        assert which == "slots" or not np.any(wrong)
    assert all((buffer == -1).all() for buffer in good.values())
    assert pool.statistics() == before
    plan.abandon()
    assert pool.match(np.arange(32, dtype=np.int32)) == 32, "the victims were not taken back"


@pytest.mark.parametrize(
    ("tables", "slots", "lengths"),
    [
        (slice(0, 2), slice(2, 7), slice(0, 4)),
        (slice(0, 2), slice(1, 6), slice(6, 10)),
        (slice(0, 2), slice(2, 7), slice(6, 10)),
    ],
    ids=["tables and lengths", "tables and slots", "slots and lengths"],
)
def test_the_buffers_of_fill_must_not_overlap(tables, slots, lengths, pool, victims):
    plan, _ = victims
    memory = np.full(12, -1, np.int32)
    with pytest.raises(ValueError, match="must not share memory"):
        plan.fill(memory[tables].reshape(2, 1), memory[slots], memory[lengths].reshape(2, 2))
    assert (memory == -1).all()
    plan.fill(memory[:2].reshape(2, 1), memory[2:7], memory[7:11].reshape(2, 2))
    assert memory[11] == -1


def test_fill_says_where_everything_goes_and_may_be_asked_twice(pool, victims):
    plan, (first, second) = victims
    seen = []
    for _ in range(2):
        tables, slots, lengths = np.empty((2, 1), np.int32), np.empty(5, np.int32), np.empty((2, 2), np.int32)
        plan.fill(tables, slots, lengths)
        seen.append((tables.tolist(), slots.tolist(), lengths.tolist()))
    assert seen[0] == seen[1]
    (a,), (b,) = seen[0][0]
    assert seen[0][1] == [4 * a, 4 * a + 1, 4 * a + 2, 4 * b, 4 * b + 1]
    assert seen[0][2] == [[0, 3], [0, 2]]
    assert first.block_table() == ids(a).tobytes()
    assert second.block_table() == ids(b).tobytes()
    assert pool.statistics()["evicted_pages"] == 2
