"""What a function reads beside its arguments: variables around it, defaults, and names of its file."""

from __future__ import annotations

import itertools
import sys
import types
from typing import TYPE_CHECKING, Any, Final

import torch

from kvhybrid.model.watch.objects import PLAIN, UNSET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvhybrid.model.watch.changing import Changing

__all__ = ["Functions", "is_of_a_library"]

# Their functions do what their files say: only their names count, and what is put in their place.
_LIBRARIES: Final = frozenset(
    {"accelerate", "kvhybrid", "numpy", "peft", "torch", "transformers", *sys.stdlib_module_names}
) - {"__main__"}
_FUNCTIONAL: Final = vars(torch.nn.functional)


class Functions:
    """Describes functions. ``entries``: place, name and what was found there, for all that was looked up."""

    def __init__(
        self,
        number_of: Callable[[object], object],
        describe: Callable[[object], object],
        changing: Changing,
    ) -> None:
        """``number_of`` names an object that has no value; ``describe`` describes any."""
        self.entries: list[Any] = []
        self.number_of = number_of
        self._describe = describe
        self._changing = changing
        self._seen: set[int] = set()
        self._entered: set[tuple[int, str]] = set()

    def describe(self, function: types.FunctionType) -> object:
        """Describe a function that a module keeps: a hook, or a method put on the object."""
        number = self.number_of(function)
        if id(function) in self._seen or is_of_a_library(function):
            return "function", number
        self._seen.add(id(function))
        found: list[object] = [*self._around(function), *self._defaults(function)]
        self.add_globals(function, found)
        return "function", number, tuple(found)

    def _around(self, function: types.FunctionType) -> Iterator[object]:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:
                value = UNSET
            if (cell, "cell_contents") not in self._changing:
                self.entries += (cell, "cell_contents", value)
                yield name, None if value is UNSET else self._describe(value)

    def _defaults(self, function: types.FunctionType) -> Iterator[object]:
        for name in ("__defaults__", "__kwdefaults__"):
            value = getattr(function, name)
            self.entries += (function, name, value)
            if value:
                yield name, self._describe(value)

    def add_globals(self, function: types.FunctionType, found: list[object]) -> None:
        """Add to ``found`` what a function finds in its file, and what the functions there find."""
        inner = _inner(function)
        known, is_library = inner.__globals__, is_of_a_library(inner)
        names = list(_names(inner.__code__))
        for name in names:
            if name in _FUNCTIONAL:
                self._add(_FUNCTIONAL, name, found, whole=False)
            if name not in known or (id(known), name) in self._entered:
                continue
            value = self._add(known, name, found, whole=not is_library)
            if isinstance(value, types.FunctionType) and value.__globals__ is known:
                self.add_globals(value, found)
            elif isinstance(value, types.ModuleType) and not is_library and not is_of_a_library(value):
                for inside in names:
                    if inside in vars(value):
                        self._add(vars(value), inside, found, whole=True)

    def _add(self, place: dict[str, Any], name: str, found: list[object], *, whole: bool) -> object:
        """Look a name up and describe what it means: functions, classes and plain values, or ``whole``."""
        value = place[name]
        if (id(place), name) in self._entered or (place, name) in self._changing:
            return None
        self._entered.add((id(place), name))
        if isinstance(value, types.ModuleType):
            return value
        if isinstance(value, types.FunctionType | types.BuiltinFunctionType | type):
            self.entries += (place, name, value)
            found.append((name, self.number_of(value)))
        elif whole or isinstance(value, PLAIN):
            self.entries += (place, name, value)
            found.append((name, self._describe(value)))
        return value


def is_of_a_library(item: types.FunctionType | types.ModuleType | type) -> bool:
    """Return whether something comes with Python, torch or a library over it."""
    name: object = item.__name__ if isinstance(item, types.ModuleType) else item.__module__
    return isinstance(name, str) and name.split(".", 1)[0] in _LIBRARIES


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names that code looks up, functions inside it included."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return itertools.chain(code.co_names, *map(_names, inner))


def _inner(function: types.FunctionType) -> types.FunctionType:
    """Return the function inside decorators that say what they wrap."""
    while isinstance(inside := getattr(function, "__wrapped__", None), types.FunctionType):
        function = inside
    return function
