"""What objects hold, compared by identity, and bytes by address."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvhybrid._core import holds, read_at, sums_at

NOTHING = np.empty(0, np.int64)


class Owner:
    def __init__(self, **held: object) -> None:
        self.__dict__.update(held)


def asked(owners: list[Any], containers: list[Any], contents: list[Any], entries: list[Any]) -> bool:
    """Ask with the owners' own attributes in front."""
    held = [vars(owner) for owner in owners]
    own = [each for owner in held for pair in owner.items() for each in pair]
    counts = np.array([*map(len, held), *map(len, containers)], np.int64)
    return holds(owners, list(map(type, owners)), held + containers, counts, own + contents, entries)


def test_the_same_objects_in_the_same_order_are_held() -> None:
    one, other = [1], [1]
    owners, known = [Owner(here=one), Owner()], {"a": one, "b": other}
    assert asked(owners, [known, one, {3}], ["a", one, "b", other, 1, 3], [known, "a", one])
    assert not asked(owners, [known], ["a", one, "b", one], [])
    assert not asked(owners, [known], ["a", one, "c", other], [])
    assert not asked(owners, [known], ["a", one], [])
    assert not asked(owners, [known], ["a", one, "b", other, 3], [])
    assert not asked(owners, [{3}], [4], [])
    assert not asked(owners, [], [], [known, "a", other])
    assert not asked(owners, [], [], [known, "c", other])
    assert holds([], [], [], NOTHING, [], [])


def test_an_ellipsis_stands_for_any_value() -> None:
    known = {"a": 1, "b": 2}
    assert asked([], [known], ["a", ..., "b", 2], [])
    known["a"] = 7
    assert asked([], [known], ["a", ..., "b", 2], [])
    known["c"] = 3
    assert not holds([], [], [known], np.array([2]), ["a", ..., "b", 2], [])


def test_an_item_more_or_less_is_seen() -> None:
    for container, contents in (({"a": 1}, ["a", 1]), ([5], [5]), ({5}, [5])):
        for count in (0, 2):
            assert not holds([], [], [container], np.array([count]), contents, [])


def test_another_class_and_other_attributes_are_seen() -> None:
    owner = Owner(a=1)
    held = [vars(owner)]
    arguments = ([owner], [Owner], held, np.array([1]), ["a", 1], list[Any]())
    assert holds(*arguments)
    owner.__class__ = type("Other", (Owner,), {})
    assert not holds(*arguments)
    owner.__class__ = Owner
    assert holds(*arguments)
    owner.__dict__ = dict(held[0])
    assert not holds(*arguments)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="1 types and 0 containers for 1 owners"):
        holds([Owner()], [Owner], [], NOTHING, [], [])
    with pytest.raises(ValueError, match="2 counts for 1 containers"):
        holds([], [], [{}], np.zeros(2, np.int64), [], [])
    with pytest.raises(AttributeError):
        holds([3], [int], [{}], np.zeros(1, np.int64), [], [])
    with pytest.raises(TypeError):
        holds([], [], [3], np.zeros(1, np.int64), [], [])
    with pytest.raises(ValueError, match="1 lengths, none below 0, for 2 addresses"):
        read_at(np.zeros(2, np.int64), np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="none below 0"):
        sums_at(np.zeros(1, np.int64), np.full(1, -1, np.int64))


@pytest.mark.parametrize("width", [1, 8, 64, 5000])
def test_bytes_are_read_where_they_lie(width: int) -> None:
    held = np.random.default_rng(width).integers(0, 256, 300_000, np.uint8)
    at = np.arange(0, len(held) - width, 97, dtype=np.int64)
    lengths = np.full(len(at), width)
    expected = b"".join(held[start : start + width].tobytes() for start in at)
    assert read_at(held.ctypes.data + at, lengths) == expected
    assert read_at(NOTHING, NOTHING) == b""


def test_pieces_of_many_lengths_are_read_in_one_call() -> None:
    held = np.random.default_rng(0).integers(0, 256, 500_000, np.uint8)
    lengths = np.array([0, 1, 70_000, 3, 200_000, 0, 65_536, 9], np.int64)
    at = np.array([5, 0, 1000, 7, 100_000, 8, 300_000, 499_991], np.int64)
    found = read_at(held.ctypes.data + at, lengths)
    pairs = zip(at, lengths, strict=True)
    assert found == b"".join(held[start : start + length].tobytes() for start, length in pairs)


def test_what_is_not_mapped_is_said_and_ends_no_process() -> None:
    held = np.zeros(100_000, np.uint8)
    good, bad = held.ctypes.data, 8
    for addresses in ([bad], [good, bad], [bad, good], [good] * 2000 + [bad]):
        for width in (8, 20_000):
            lengths = np.full(len(addresses), width, np.int64)
            assert read_at(np.array(addresses), lengths) is None
            assert sums_at(np.array(addresses), lengths) is None


def test_a_sum_depends_on_every_byte_and_its_place() -> None:
    held = np.random.default_rng(1).integers(0, 256, 200_000, np.uint8)
    at, lengths = (
        np.array([0, 65_536, 131_072, 10], np.int64),
        np.array([65_536, 65_536, 68_928, 64], np.int64),
    )

    def sums() -> list[int]:
        found = sums_at(held.ctypes.data + at, lengths)
        assert found is not None
        return np.frombuffer(found, np.uint64).tolist()

    before = sums()
    assert sums() == before
    held[[70_000, 70_001]] += np.array([1, 255], np.uint8)  # the same total
    after = sums()
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True, True]
