"""What crosses into the native core: which buffers, which errors, whose pages, which threads."""

import gc
import sys
import threading
from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvhybrid._core import (
    Batch,
    CapacityError,
    ClosedError,
    KVHybridError,
    PagePool,
    TokenBuffer,
)

PROMPT = [1, 2, 3, 4, 5, 6, 7]
LONG = 300_000  # past what is worked on without letting go of the interpreter


def ids(*tokens):
    return np.array(tokens, np.int32)


def plan_one(pool, prompt, *counts, **appended):
    """Plan a step of one new sequence."""
    sequence = pool.open(ids(*prompt))
    return Batch(pool, [sequence]).plan(*counts, **appended)


def held(pool):
    """Pages that a sequence or an open plan holds, and the sequences."""
    now = pool.statistics()
    return now["mutable_pages"] + now["pinned_pages"], now["sequences"]


@pytest.fixture
def pool():
    return PagePool(8, 4)


# Tokens


@pytest.mark.parametrize(
    "tokens",
    [
        np.array(PROMPT, np.int32),
        np.array(PROMPT, np.int64),
        np.array(PROMPT, np.uint32),
        np.array(PROMPT, "<i4"),
        array("i", PROMPT),
        array("I", PROMPT),
        array("q", PROMPT),
        memoryview(array("i", PROMPT)),
        memoryview(np.array(PROMPT, np.int64)),
        memoryview(np.array(PROMPT, np.int32).tobytes()).cast("i"),
        np.array([0, *PROMPT], np.int64)[1:],
        TokenBuffer(np.array(PROMPT, np.int32)),
    ],
    ids=lambda tokens: f"{type(tokens).__name__}-{getattr(tokens, 'dtype', getattr(tokens, 'format', ''))}",
)
def test_every_buffer_of_token_ids_is_taken(tokens, pool, compute):
    sequence = pool.open(tokens)
    sequence.append(tokens)
    assert np.frombuffer(sequence.tokens(), np.uint32).tolist() == PROMPT * 2
    compute(pool, sequence)
    assert pool.match(tokens) == len(PROMPT)
    assert TokenBuffer(tokens).tobytes() == sequence.tokens()[: 4 * len(PROMPT)]
    assert TokenBuffer(np.array(PROMPT, np.int32)).common_prefix(tokens) == len(PROMPT)


def test_a_torch_tensor_is_taken_as_it_is_or_through_numpy(pool):
    torch = pytest.importorskip("torch")
    assert pool.open(torch.tensor(PROMPT)).pending == len(PROMPT)
    assert pool.open(torch.tensor(PROMPT).numpy()).pending == len(PROMPT)
    assert pool.open(torch.tensor(PROMPT, dtype=torch.int32).numpy()).pending == len(PROMPT)


def test_a_read_only_buffer_of_tokens_is_read(pool):
    tokens = ids(*PROMPT)
    tokens.flags.writeable = False
    assert pool.open(tokens).pending == len(PROMPT)


@pytest.mark.parametrize(
    "empty",
    [
        np.array([], np.int32),
        np.array([], np.int64),
        memoryview(b"").cast("i"),
        TokenBuffer(),
        array("i"),
        array("q"),
    ],
    ids=lambda tokens: type(tokens).__name__,
)
def test_no_tokens_are_tokens(empty, pool):
    assert pool.match(empty) == 0
    sequence = pool.open(empty)
    sequence.append(empty)
    assert (sequence.length, sequence.pending) == (0, 0)
    assert len(TokenBuffer(empty)) == 0


# Every way in: each takes tokens and one token a row where there are rows.
ENTRIES = {
    "match": lambda pool, tokens: pool.match(tokens),
    "open": lambda pool, tokens: pool.open(tokens),
    "append": lambda pool, tokens: pool.open(ids(1)).append(tokens),
    "plan": lambda pool, tokens: Batch(pool, [one := pool.open(ids(1)), one.fork()]).plan(tokens=tokens),
    "TokenBuffer": lambda pool, tokens: TokenBuffer(tokens),
    "TokenBuffer.append": lambda pool, tokens: TokenBuffer().append(tokens),
    "TokenBuffer.common_prefix": lambda pool, tokens: TokenBuffer(ids(1)).common_prefix(tokens),
}
entries = pytest.mark.parametrize("enter", ENTRIES.values(), ids=ENTRIES)


@entries
@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([1, 2], "tokens must be a buffer of integers, not <class 'list'>"),
        ((1, 2), "tokens must be a buffer of integers, not <class 'tuple'>"),
        ("12", "tokens must be a buffer of integers, not <class 'str'>"),
        (1, "tokens must be a buffer of integers, not <class 'int'>"),
        (b"12", "tokens must hold int32, int64 or uint32, not items of format 'B' and 1 bytes"),
        (np.array([1.0, 2.0]), "not items of format 'd' and 8 bytes"),
        (np.array([1.0, 2.0], np.float32), "not items of format 'f' and 4 bytes"),
        (np.array([1, 2], np.int16), "not items of format 'h' and 2 bytes"),
        (np.array([1, 2], np.uint64), "and 8 bytes"),
        (np.array([True, False]), "not items of format '?' and 1 bytes"),
        (np.array([1, 2], ">i4"), "not items of format '>i' and 4 bytes"),
        (array("f", [1.0, 2.0]), "not items of format 'f' and 4 bytes"),
    ],
)
def test_what_holds_no_token_ids_is_a_type_error(enter, tokens, says, pool):
    with pytest.raises(TypeError) as raised:
        enter(pool, tokens)
    assert says in str(raised.value)
    assert pool.num_free == 8


@entries
@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (np.array([[1, 2]], np.int32), "tokens must have 1 dimensions, not 2"),
        (np.array(1, np.int32), "tokens must have 1 dimensions, not 0"),
        (np.array([1, 0, 2, 0], np.int32)[::2], "tokens must be contiguous"),
        (np.array([1, 2], np.int64)[::-1], "tokens must be contiguous"),
        (np.frombuffer(bytes(9), np.int32, 2, offset=1), "tokens must be aligned to its items"),
    ],
)
def test_what_is_no_plain_run_of_token_ids_is_a_value_error(enter, tokens, says, pool):
    with pytest.raises(ValueError) as raised:
        enter(pool, tokens)
    assert says in str(raised.value)
    assert pool.num_free == 8


@entries
@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (np.array([5, -1], np.int32), -1),
        (np.array([5, -(2**31)], np.int32), -(2**31)),
        (array("i", [5, -7]), -7),
        (np.array([5, 2**31], np.uint32), 2**31),
        (np.array([5, 2**32 - 1], np.uint32), 2**32 - 1),
    ],
)
def test_a_4_byte_id_out_of_range_is_refused_with_its_place_and_value(enter, tokens, value, pool):
    with pytest.raises(ValueError) as raised:
        enter(pool, tokens)
    assert str(raised.value) == f"token ids lie in 0..2147483648, and index 1 holds {value}"
    assert pool.num_free == 8


@entries
@pytest.mark.parametrize("value", [-1, -(2**63), 2**31, 2**32 + 5, 2**63 - 1])
def test_an_8_byte_id_out_of_range_is_refused_with_its_place_and_value(enter, value, pool):
    with pytest.raises(ValueError) as raised:
        enter(pool, np.array([5, value], np.int64))
    assert str(raised.value) == f"token ids lie in 0..2147483648, and index 1 holds {value}"
    assert pool.num_free == 8


def test_the_largest_id_is_taken(pool):
    for dtype in (np.int32, np.int64, np.uint32):
        tokens = np.array([0, 2**31 - 1], dtype)
        assert np.frombuffer(pool.open(tokens).tokens(), np.uint32).tolist() == [0, 2**31 - 1]


def test_a_wrong_id_far_inside_and_behind_a_match_is_named_by_its_place(pool, compute):
    sequence = pool.open(ids(*PROMPT))
    compute(pool, sequence)
    tokens = np.ones(LONG, np.int32)
    tokens[:7] = PROMPT
    tokens[250_001] = -3
    with pytest.raises(ValueError, match="index 250001 holds -3"):
        pool.open(tokens)


def test_a_refused_append_appends_nothing(pool):
    sequence = pool.open(ids(1, 2))
    buffer = TokenBuffer(ids(1, 2))
    for append in (sequence.append, buffer.append):
        with pytest.raises(ValueError, match="index 1"):
            append(ids(3, -4))
    assert sequence.tokens() == buffer.tobytes() == ids(1, 2).tobytes()


def test_long_runs_are_the_same_as_short_ones(compute):
    pool = PagePool(LONG // 64 + 2, 64)
    tokens = np.arange(LONG, dtype=np.int64)
    buffer = TokenBuffer(tokens)
    sequence = pool.open(buffer)
    sequence.append(tokens[:5])
    compute(pool, sequence)
    assert sequence.length == LONG + 5
    sequence.close()
    assert pool.match(buffer) == pool.match(tokens) == buffer.common_prefix(tokens) == LONG
    tokens[LONG - 10] = 0
    assert pool.match(tokens) == buffer.common_prefix(tokens) == LONG - 10
    assert buffer.append(buffer) == 2 * LONG


# The buffers of `fill`


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


# Errors


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


# A sequence that goes while its plan is open


@pytest.mark.parametrize("how", ["close", "drop"])
@pytest.mark.parametrize("when", ["before fill", "after fill"])
@pytest.mark.parametrize("end", ["commit", "abandon", "drop"])
def test_a_sequence_closed_in_an_open_plan_goes_when_that_is_finished(how, when, end, pool):
    sequence, other = pool.open(ids(*PROMPT)), pool.open(ids(50, 51))
    plan = Batch(pool, [sequence, other]).plan()
    tables, slots, lengths = (
        np.full((2, 2), -1, np.int32),
        np.full(9, -1, np.int32),
        np.empty((2, 2), np.int32),
    )
    if when == "after fill":
        plan.fill(tables, slots, lengths)
    if how == "close":
        sequence.close()
        assert sequence.closed
        with pytest.raises(ClosedError):
            sequence.block_table()
    else:
        del sequence
    pool.check()
    assert pool.num_free == 5, "its pages are the plan's"
    if when == "before fill":
        plan.fill(tables, slots, lengths)
    assert len(set(slots.tolist())) == 9
    assert lengths.tolist() == [[0, 7], [0, 2]]
    if end == "drop":
        del plan
    else:
        getattr(plan, end)()
    pool.check()
    assert pool.statistics()["sequences"] == 1
    assert pool.match(ids(*PROMPT)) == (7 if end == "commit" else 0)
    assert other.length == (2 if end == "commit" else 0)
    other.close()
    assert pool.num_free + pool.num_evictable == 8


# Whose pages


@pytest.mark.parametrize("how", ["close", "drop", "cycle"])
def test_a_sequence_that_goes_gives_its_pages_back(how, compute):
    pool = PagePool(8, 4, keep_tails=False)
    sequence = pool.open(ids(*PROMPT))
    compute(pool, sequence)
    assert pool.num_free == 6
    if how == "close":
        sequence.close()
    elif how == "drop":
        del sequence
    else:
        circle = [sequence]
        circle.append(circle)
        del sequence, circle
        gc.collect()
    assert (pool.num_free, pool.num_evictable) == (7, 1)
    assert held(pool) == (0, 0)


def test_a_dropped_plan_is_abandoned(pool):
    sequence = pool.open(ids(*PROMPT))
    plan = Batch(pool, [sequence]).plan(tokens=ids(8))
    assert pool.num_free == 6
    del plan
    assert pool.num_free == 8
    assert (sequence.length, sequence.pending, sequence.num_pages) == (0, 7, 0)
    assert pool.statistics()["abandoned_plans"] == 1


def test_handles_keep_the_pool_alive():
    sequence = PagePool(8, 4).open(ids(*PROMPT))
    batch = Batch(PagePool(8, 4))
    gc.collect()
    assert sequence.pending == 7
    assert len(batch) == 0
    sequence.fork().close()


def test_ten_thousand_sequences_come_and_go_and_leave_nothing():
    pool = PagePool(64, 4, keep_tails=False)
    prompts = [np.arange(n, n + 3, dtype=np.int32) for n in range(100)]
    opened = 0
    grown = []
    for _ in range(2):
        for n in range(5_000):
            sequence = pool.open(prompts[n % 100], n % 7)
            plan = Batch(pool, [sequence]).plan()
            if n % 3:
                plan.commit()
            opened += 1
            del sequence, plan
        grown.append(pool.bookkeeping_bytes())
    now = pool.statistics()
    gone = ("mutable_pages", "sealed_pages", "shared_pages", "pinned_pages", "sequences", "nodes")
    assert [now[name] for name in gone] == [0] * len(gone)
    assert (now["opens"], now["free_pages"]) == (opened, 64) == (10_000, 64)
    assert grown[0] == grown[1]
    pool.check()


# Threads


def test_threads_that_share_a_pool_do_not_see_each_other():  # noqa: C901  # told in one piece
    pool = PagePool(48, 4)
    memory = np.zeros((48, 4), np.int64)
    prompts = [[stem, *range(10, 10 + length)] for stem in (1, 2) for length in (3, 8, 17)]
    failures, refused = [], []
    start = threading.Barrier(4)

    def run(seed):
        choose = np.random.default_rng(seed)
        try:
            start.wait()
            for _ in range(300):
                prompt = prompts[choose.integers(len(prompts))]
                sequence = pool.open(ids(*prompt), reuse=bool(choose.integers(4)))
                batch = Batch(pool, [sequence])
                for tokens in (None, ids(100 + seed), ids(7)):
                    try:
                        plan = batch.plan(tokens=tokens)
                    except CapacityError:
                        refused.append(seed)
                        break
                    tables = np.empty((1, plan.max_pages), np.int32)
                    slots = np.empty(plan.num_tokens, np.int32)
                    lengths = np.empty((1, 2), np.int32)
                    plan.fill(tables, slots, lengths)
                    for source, destination in plan.copies:
                        memory[destination] = memory[source]
                    text = np.frombuffer(sequence.tokens(), np.uint32)
                    # What a slot holds depends on everything before it, as K and V do.
                    written = np.cumsum(text.astype(np.int64) * (np.arange(len(text)) + 1))
                    memory.ravel()[slots] = written[lengths[0, 0] :]
                    if choose.integers(8) == 0:
                        plan.abandon()
                        break
                    plan.commit()
                    table = np.frombuffer(sequence.block_table(), np.int32)
                    assert np.array_equal(memory[table].ravel()[: sequence.length], written)
                if choose.integers(2):
                    sequence.close()
        except BaseException as error:  # noqa: BLE001  # it must reach the test's thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(refused) < 600
    pool.check()
    assert held(pool) == (0, 0)
    assert pool.num_free + pool.num_evictable == 48
    assert pool.statistics()["opens"] == 1200


def test_only_one_of_many_threads_finishes_a_plan(pool):
    for _ in range(50):
        sequence = pool.open(ids(*PROMPT), reuse=False)
        plan = Batch(pool, [sequence]).plan()
        start = threading.Barrier(3)
        won = []

        def finish(end, start=start, won=won):
            start.wait()
            try:
                end()
                won.append(end)
            except ClosedError:
                pass

        threads = [
            threading.Thread(target=finish, args=(end,)) for end in (plan.commit, plan.abandon, plan.commit)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        sequence.close()
    pool.check()
    assert held(pool) == (0, 0)


def test_a_long_call_lets_others_run():
    pool = PagePool(4, 16)
    tokens = np.ones(10_000_000, np.int32)
    count = 0
    go, counted, done = threading.Lock(), threading.Lock(), False

    def tick():
        nonlocal count
        while go.acquire() and not done:
            count += 1
            counted.release()

    go.acquire()
    counted.acquire()
    thread = threading.Thread(target=tick)
    thread.start()
    # From here on nobody who holds the interpreter is made to give it up: whoever counts while the
    # call runs was let in by the call.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        moved, tries = 0, 0
        while not moved and tries < 50:
            before = count
            go.release()
            pool.open(tokens)
            moved = count - before
            counted.acquire()
            tries += 1
    finally:
        sys.setswitchinterval(interval)
        done = True
        go.release()
        thread.join()
    assert moved == 1


# TokenBuffer


tokens_of = st.lists(st.integers(0, 3) | st.integers(0, 2**31 - 1), max_size=12)
edits = st.lists(tokens_of | st.integers(0, 40), max_size=12)


@given(tokens_of, edits)
def test_a_token_buffer_is_a_list_of_tokens(first, steps):
    buffer, model = TokenBuffer(np.array(first, np.int64)), [*first]
    for step in steps:
        if isinstance(step, int):
            buffer.truncate(step)
            del model[step:]
        else:
            model += step
            assert buffer.append(np.array(step, np.uint32)) == len(model)
        assert len(buffer) == len(model)
        assert np.frombuffer(buffer.tobytes(), np.uint32).tolist() == model


@given(tokens_of, st.integers(0, 14), st.integers(0, 14))
def test_a_token_buffer_is_cut_like_a_list(tokens, start, stop):
    buffer = TokenBuffer(np.array(tokens, np.int32))
    if start <= stop <= len(tokens):
        assert np.frombuffer(buffer.tobytes(start, stop), np.uint32).tolist() == tokens[start:stop]
    else:
        with pytest.raises(ValueError, match="is not within"):
            buffer.tobytes(start, stop)


@given(tokens_of, tokens_of, tokens_of, st.sampled_from([np.int32, np.int64, np.uint32]))
def test_a_common_prefix_ends_where_two_texts_differ(stem, one, other, dtype):
    one, other = stem + one, stem + other
    expected = next(
        (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other))
    )
    buffer = TokenBuffer(np.array(one, dtype))
    assert buffer.common_prefix(np.array(other, dtype)) == expected
    assert buffer.common_prefix(TokenBuffer(np.array(other, dtype))) == expected
    assert len(buffer) == len(one)


@pytest.mark.parametrize("length", [1, 255, 256, 257, 511, 512, 513, 1000])
def test_a_common_prefix_is_found_past_every_chunk(length):
    tokens = np.arange(1024, dtype=np.int32)
    other = tokens.copy()
    other[length] = 5000
    assert TokenBuffer(tokens).common_prefix(other) == length


def test_a_token_buffer_meets_itself():
    buffer = TokenBuffer(ids(1, 2))
    assert buffer.common_prefix(buffer) == 2
    assert buffer.append(buffer) == 4
    assert buffer.tobytes() == ids(1, 2, 1, 2).tobytes()


def test_a_token_buffer_keeps_its_own_copy():
    tokens = ids(1, 2)
    buffer = TokenBuffer(tokens)
    tokens[:] = 9
    assert buffer.tobytes() == ids(1, 2).tobytes()
    taken = buffer.tobytes()
    buffer.truncate(0)
    assert taken == ids(1, 2).tobytes()
