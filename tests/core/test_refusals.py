"""What the native core refuses, in which words, and that nothing has changed then."""

from array import array

import numpy as np
import pytest
from native import PROMPT, held, ids, plan_one

from kvhybrid._core import (
    Batch,
    CapacityError,
    ClosedError,
    KVHybridError,
    PagePool,
    TokenBuffer,
)


def test_the_errors_have_one_base_and_no_other_kind():
    assert issubclass(CapacityError, KVHybridError)
    assert issubclass(ClosedError, KVHybridError)
    assert not issubclass(KVHybridError, ValueError)


def test_no_room_is_an_error_with_the_numbers_and_changes_nothing(pool, compute):
    cold = pool.open(ids(*range(12)))
    compute(pool, cold)
    cold.close()
    holder = pool.open(ids(*range(5)))
    waiting = pool.open(np.arange(50, 81, dtype=np.int32))
    batch = Batch(pool, [holder, waiting])
    before = pool.statistics()
    tables = holder.block_table(), waiting.block_table()
    with pytest.raises(CapacityError, match=r"^needs 9 pages, 5 free, 2 evictable of 8$"):
        batch.plan(tokens=ids(5, 6))
    assert pool.statistics() == before
    assert (holder.block_table(), waiting.block_table()) == tables
    assert (holder.pending, waiting.pending) == (1, 31)
    assert batch.plan(ids(1, 24)).num_evicted == 2


CALLS = {
    "length": lambda sequence: sequence.length,
    "pending": lambda sequence: sequence.pending,
    "num_pages": lambda sequence: sequence.num_pages,
    "append": lambda sequence: sequence.append(ids(1)),
    "tokens": lambda sequence: sequence.tokens(),
    "block_table": lambda sequence: sequence.block_table(),
    "fork": lambda sequence: sequence.fork(),
    "truncate": lambda sequence: sequence.truncate(0),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_closed_sequence_says_so(call, pool, compute):
    sequence = pool.open(ids(*PROMPT))
    compute(pool, sequence)
    sequence.close()
    with pytest.raises(ClosedError, match="the sequence is closed"):
        call(sequence)
    sequence.close()
    assert sequence.closed
    assert sequence.cached == 0
    assert "closed" in repr(sequence)


def test_a_handle_stays_closed_when_its_place_is_taken(pool):
    old = pool.open(ids(1))
    old.close()
    new = pool.open(ids(2))
    assert old.closed
    old.close()
    assert not new.closed
    assert new.pending == 1


def test_a_closed_row_is_named_and_the_others_are_left_alone(pool):
    first, second = pool.open(ids(1)), pool.open(ids(2))
    batch = Batch(pool, [first, second])
    second.close()
    with pytest.raises(ClosedError, match="row 1 is closed"):
        batch.plan()
    batch.remove(second)
    assert batch.plan().num_tokens == 1


def test_a_dropped_row_is_closed_for_a_batch_keeps_nobody(pool):
    batch = Batch(pool, [pool.open(ids(1))])
    assert held(pool) == (0, 0)
    with pytest.raises(ClosedError, match="row 0"):
        batch.plan()


@pytest.mark.parametrize("end", ["commit", "abandon"])
@pytest.mark.parametrize("then", ["commit", "abandon", "fill"])
def test_a_plan_is_finished_once(end, then, pool):
    sequence = pool.open(ids(*PROMPT))
    plan = Batch(pool, [sequence]).plan()
    tables, slots, lengths = np.empty((1, 2), np.int32), np.empty(7, np.int32), np.empty((1, 2), np.int32)
    plan.fill(tables, slots, lengths)
    getattr(plan, end)()
    before = pool.statistics()
    with pytest.raises(ClosedError, match="already committed or abandoned"):
        getattr(plan, then)(*((tables, slots, lengths) if then == "fill" else ()))
    assert pool.statistics() == before
    assert sequence.length == (7 if end == "commit" else 0)
    assert (plan.num_tokens, plan.copies) == (7, [])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda pool: PagePool(8, 3), "block_size must be a power of two, not 3"),
        (lambda pool: PagePool(8, 0), "block_size must be a power of two, not 0"),
        (lambda pool: PagePool(0, 4), "num_pages must lie in 1..=536870912 for blocks of 4, not 0"),
        (
            lambda pool: PagePool(2**31, 2),
            "num_pages must lie in 1..=1073741824 for blocks of 2, not 2147483648",
        ),
        (lambda pool: PagePool(2**62, 8), "not 4611686018427387904"),
        (lambda pool: pool.open(ids(1), align=0), "align must be at least 1, not 0"),
        (lambda pool: pool.open(ids(1, 2)).truncate(3), "cannot truncate to 3: the sequence has 2 tokens"),
        (lambda pool: Batch(pool, [one := pool.open(ids(1)), one]), "is already in row 0"),
        (lambda pool: Batch(pool).remove(pool.open(ids(1))), "is in none of the 0 rows"),
        (lambda pool: Batch(pool).add(PagePool(8, 4).open(ids(1))), "belongs to another pool"),
        (
            lambda pool: plan_one(pool, [1, 2], ids(3)),
            "row 0 has 2 pending tokens, not 3",
        ),
        (
            lambda pool: plan_one(pool, [1, 2], ids(-1)),
            "row 0 has 2 pending tokens, not -1",
        ),
        (lambda pool: plan_one(pool, [1], ids(1, 1)), "one a row: 2 for 1 rows"),
        (lambda pool: plan_one(pool, [1], tokens=ids()), "one a row: 0 for 1 rows"),
        (
            lambda pool: plan_one(pool, [1], ids(1)[None]),
            "counts must have 1 dimensions",
        ),
        (lambda pool: TokenBuffer(ids(1, 2)).tobytes(1, 3), "[1, 3) is not within 2 tokens"),
        (lambda pool: TokenBuffer(ids(1, 2)).tobytes(2, 1), "[2, 1) is not within 2 tokens"),
        (lambda pool: TokenBuffer(ids(1, 2)).tobytes(3), "[3, 2) is not within 2 tokens"),
    ],
)
def test_what_cannot_be_meant_is_a_value_error_with_the_numbers(call, says, pool):
    with pytest.raises(ValueError) as raised:
        call(pool)
    assert says in str(raised.value)
    pool.check()
    assert pool.num_free == 8


@pytest.mark.parametrize(
    "counts",
    [np.array([1], np.int64), np.array([1.0]), [1], array("I", [1])],
    ids=lambda counts: str(type(counts)),
)
def test_counts_are_int32(counts, pool):
    sequence = pool.open(ids(1))
    with pytest.raises(TypeError, match="counts must"):
        Batch(pool, [sequence]).plan(counts)
    assert Batch(pool, [sequence]).plan(ids(1)).num_tokens == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda pool: PagePool(-1, 4),
        lambda pool: pool.evict(-1),
        lambda pool: pool.drop(-1),
        lambda pool: pool.match(ids(1), -1),
        lambda pool: pool.open(ids(1), 2**64),
        lambda pool: pool.open(ids(1), align=-1),
        lambda pool: pool.open(ids(1)).truncate(-1),
        lambda pool: TokenBuffer().truncate(-1),
        lambda pool: TokenBuffer().tobytes(-1),
    ],
)
def test_numbers_without_a_sign_have_none(call, pool):
    with pytest.raises(OverflowError):
        call(pool)


def test_a_refused_row_leaves_the_rows_before_it_free(pool):
    first, second = pool.open(ids(1, 2)), pool.open(ids(3))
    batch = Batch(pool, [first, second])
    with pytest.raises(ValueError, match="row 1 has 1 pending tokens, not 5"):
        batch.plan(ids(2, 5))
    first.append(ids(9))
    assert batch.plan(ids(3, 1)).num_tokens == 4


def test_a_planned_sequence_waits_for_its_plan(pool):
    sequence = pool.open(ids(1, 2))
    plan = Batch(pool, [sequence]).plan(ids(1))
    for call in (
        lambda: sequence.append(ids(3)),
        lambda: sequence.truncate(1),
        sequence.fork,
        Batch(pool, [sequence]).plan,
    ):
        with pytest.raises(ValueError, match="is in an open plan"):
            call()
    plan.commit()
    sequence.append(ids(3))
    assert (sequence.length, sequence.pending) == (1, 2)


def test_a_row_of_no_tokens_is_not_in_the_plan(pool):
    first, second = pool.open(ids(1, 2)), pool.open(ids(3))
    plan = Batch(pool, [first, second]).plan(ids(0, 1))
    first.append(ids(9))
    tables, slots, lengths = (
        np.full((2, 1), -1, np.int32),
        np.full(1, -1, np.int32),
        np.full((2, 2), -1, np.int32),
    )
    plan.fill(tables, slots, lengths)
    assert tables[0, 0] == -1
    assert lengths.tolist() == [[0, 0], [0, 1]]
    plan.commit()
    assert (first.length, first.pending, second.length) == (0, 3, 1)


def test_what_a_batch_without_rows_plans_is_nothing(pool):
    plan = Batch(pool).plan()
    assert (plan.num_tokens, plan.max_pages, plan.num_evicted) == (0, 0, 0)
    plan.fill(np.empty((0, 1), np.int32), np.empty(0, np.int32), np.empty((0, 2), np.int32))
    plan.commit()


def test_rows_move_up_when_one_is_taken_out(pool):
    rows = [pool.open(ids(n)) for n in range(3)]
    batch = Batch(pool)
    assert [batch.add(row) for row in rows] == [0, 1, 2]
    batch.remove(rows[0])
    assert len(batch) == 2
    assert batch.add(rows[0]) == 2
    tables, slots, lengths = np.empty((3, 1), np.int32), np.empty(3, np.int32), np.empty((3, 2), np.int32)
    with batch_step(batch, tables, slots, lengths):
        assert [rows[n].block_table() for n in (1, 2, 0)] == [row.tobytes() for row in tables]


class batch_step:  # noqa: N801  # reads as a verb where it stands
    """A filled plan that is committed at the end."""

    def __init__(self, batch, tables, slots, lengths):
        self.plan = batch.plan()
        self.plan.fill(tables, slots, lengths)

    def __enter__(self):
        return self.plan

    def __exit__(self, *_):
        self.plan.commit()
