"""What has a value to be told apart by, and numbers for objects of this process that have none."""

from __future__ import annotations

import functools
import itertools
import weakref
from typing import Final, NamedTuple

import torch

__all__ = ["PLAIN", "UNSET", "Number", "Objects", "objects"]

PLAIN: Final = (
    bool, int, float, complex, str, bytes, type(None),
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip
"""Kinds of objects that are described by their value."""
UNSET: Final = object()
"""Stands for a variable that nothing was put into yet: what is found there later is always something else."""


class Number(NamedTuple):
    """A number that stands for one object of this process, and for no other one ever."""

    value: int


class Objects:
    """Numbers for objects that have no value to be told apart by."""

    def __init__(self) -> None:
        self._next = itertools.count(1)
        self._weak: dict[int, tuple[weakref.ref[object], Number]] = {}
        self._held: dict[int, tuple[object, Number]] = {}

    def number(self, item: object, held: dict[int, tuple[object, Number]]) -> Number:
        """Return the number of an object. ``held`` keeps alive what cannot be referred to weakly."""
        key = id(item)
        if (known := self._weak.get(key)) is not None and known[0]() is item:
            return known[1]
        if (kept := held.get(key)) is not None:
            return kept[1]
        number = Number(next(self._next))
        try:
            reference = weakref.ref(item, functools.partial(self._forget, key, number))
        except TypeError:
            held[key] = item, number
        else:
            self._weak[key] = reference, number
        return number

    def _forget(self, key: int, number: Number, _: object) -> None:
        # The key may be another object's by now.
        if (known := self._weak.get(key)) is not None and known[1] == number:
            self._weak.pop(key, None)


objects: Final = Objects()
"""Those of the process."""
