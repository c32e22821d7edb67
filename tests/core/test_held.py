"""What objects hold, compared by identity, and bytes by address."""

from __future__ import annotations

import numpy as np
import pytest

from kvhybrid._core import holds, read_at


class Owner:
    def __init__(self, **held: object) -> None:
        self.__dict__.update(held)


def test_the_same_objects_in_the_same_order_are_held() -> None:
    one, other = [1], [1]
    first, second = {"a": one, "b": other}, dict[str, object]()
    owners = [Owner(here=first, there=second), Owner(here=second, there=first)]
    dicts = [first, second, second, first]
    assert holds(owners, ("here", "there"), dicts, [one, other, one, other])
    assert not holds(owners, ("here", "there"), dicts, [one, one, one, other])
    assert not holds(owners, ("here", "there"), dicts, [one, other, one])
    assert not holds(owners, ("here", "there"), dicts, [one, other, one, other, one])
    assert holds([], (), [], [])


def test_an_equal_dictionary_is_not_the_one_that_was_held() -> None:
    known = {"a": 1}
    assert not holds([Owner(here=dict(known))], ("here",), [known], [1])
    assert not holds([Owner()], ("here",), [known], [1])


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="1 dictionaries for 2 names of 1 owners"):
        holds([Owner()], ("a", "b"), [{}], [])
    with pytest.raises(AttributeError):
        holds([3], ("a",), [{}], [])
    no_dict: list[object] = []
    with pytest.raises(TypeError):
        holds([Owner(a=no_dict)], ("a",), [no_dict], [])  # type: ignore[arg-type,list-item]


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_bytes_are_read_where_they_lie(width: int) -> None:
    held = np.arange(64, dtype=np.uint8)
    at = np.array([0, 8, 3, 56], np.int64)
    expected = b"".join(held[start : start + width].tobytes() for start in at)
    assert read_at(held.ctypes.data + at, width) == expected
    assert read_at(np.empty(0, np.int64), width) == b""
