"""The functions that a class runs: its own methods, and what these find in their files."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Classes", "plain_function"]

# Classes whose methods move and load a model, and run no layer.
_GENERAL: Final = (
    "transformers.distributed",
    "transformers.generation",
    "transformers.integrations.peft",
    "transformers.modeling_utils",
    "transformers.utils",
)
# Methods of torch's own base class that a call runs.
_CALLS: Final = frozenset({"__call__", "_call_impl", "_wrapped_call_impl", "__getattr__"})


class Classes:
    """Describes classes. ``entries``: namespace, name and what was found there, for every function."""

    def __init__(self, number_of: Callable[[object], object]) -> None:
        """``number_of`` names an object that has no value."""
        self.entries: list[Any] = []
        self._number_of = number_of
        self._known: dict[type, object] = {}
        self._entered: set[tuple[int, str]] = set()

    def describe(self, kind: type) -> object:
        """Describe a class by the functions that it runs: its own, and those found in their files."""
        return tuple(
            self._functions(each)
            for each in kind.__mro__
            if each is not object and not each.__module__.startswith(_GENERAL)
        )

    def _functions(self, kind: type) -> object:
        if kind in self._known:
            return self._known[kind]
        methods: list[tuple[str, object]] = []
        for name, value in list(vars(kind).items()):
            function = plain_function(value)
            is_run = kind is not torch.nn.Module or name in _CALLS
            if is_run and isinstance(function, types.FunctionType):
                self.entries += (vars(kind), name, value)
                methods.append((name, self._number_of(function)))
                if kind.__module__.split(".", 1)[0] != "torch":
                    self._add_globals(function, methods)
        self._known[kind] = found = self._number_of(kind), tuple(methods)
        return found

    def _add_globals(self, function: types.FunctionType, methods: list[tuple[str, object]]) -> None:
        """Add the functions and classes that a function finds in its file, and those that they find."""
        inner = _inner(function)
        known = inner.__globals__
        for name in inner.__code__.co_names:
            value = known.get(name)
            if not isinstance(value, types.FunctionType | type) or (id(known), name) in self._entered:
                continue
            self._entered.add((id(known), name))
            self.entries += (known, name, value)
            methods.append((name, self._number_of(value)))
            if isinstance(value, types.FunctionType) and value.__globals__ is known:
                self._add_globals(value, methods)


def plain_function(value: object) -> object:
    """Return the function inside a static or class method or a property, or ``value`` itself."""
    if isinstance(value, staticmethod | classmethod):
        return value.__func__
    return value.fget if isinstance(value, property) else value


def _inner(function: types.FunctionType) -> types.FunctionType:
    """Return the function inside decorators that say what they wrap."""
    while isinstance(inside := getattr(function, "__wrapped__", None), types.FunctionType):
        function = inside
    return function
