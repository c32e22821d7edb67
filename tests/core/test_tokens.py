"""Tokens on their way into the native core: which buffers are taken, and what is said of others."""

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from native import LONG, PROMPT, ids

from kvhybrid._core import (
    Batch,
    PagePool,
    TokenBuffer,
)


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
