"""What a class runs: its own methods, what these find in their files, and plain attributes."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from kvhybrid.model.watch.functions import is_of_a_library
from kvhybrid.model.watch.objects import PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvhybrid.model.watch.functions import Functions

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


# Attributes of a class that its methods may read as numbers.
_VALUES: Final = (*PLAIN, torch.Tensor, torch.nn.Module, np.ndarray, list, dict, set, tuple)
_DESCRIPTORS: Final = (property, types.GetSetDescriptorType, types.MemberDescriptorType)


class Classes:
    """Describes classes. ``entries``: attributes of a class, name and what was found there, three a function.

    ``attributes``: those of every class that was described.
    """

    def __init__(self, functions: Functions, describe: Callable[[object], object]) -> None:
        """``describe`` describes any value."""
        self.entries: list[Any] = []
        self.attributes: list[types.MappingProxyType[str, Any]] = []
        self._functions = functions
        self._describe = describe
        self._known: dict[type, object] = {}

    def describe(self, kind: type) -> object:
        """Describe a class by what it runs and has: its own, and what is found in the files."""
        return tuple(
            self._own(each)
            for each in kind.__mro__
            if each is not object and not each.__module__.startswith(_GENERAL)
        )

    def _own(self, kind: type) -> object:
        if kind in self._known:
            return self._known[kind]
        found: list[object] = []
        attributes = vars(kind)
        self.attributes.append(attributes)
        is_of_torch = kind.__module__.split(".", 1)[0] == "torch"
        for name, value in list(attributes.items()):
            function = plain_function(value)
            if isinstance(function, types.FunctionType):
                if kind is torch.nn.Module and name not in _CALLS:
                    continue
                self.entries += (attributes, name, value)
                found.append((name, self._functions.number_of(function)))
                self._functions.add_globals(function, found)
            elif not is_of_torch and _may_be_read(kind, name, value):
                self.entries += (attributes, name, value)
                found.append((name, self._describe(value)))
        self._known[kind] = described = self._functions.number_of(kind), tuple(found)
        return described


def _may_be_read(kind: type, name: str, value: object) -> bool:
    """Return whether methods of a class may read this attribute of it as a number, or call it."""
    if name.startswith("__") or isinstance(value, _DESCRIPTORS):
        return False
    return isinstance(value, _VALUES) or not is_of_a_library(kind)


def plain_function(value: object) -> object:
    """Return the function inside a static or class method or a property, or ``value`` itself."""
    if isinstance(value, staticmethod | classmethod):
        return value.__func__
    return value.fget if isinstance(value, property) else value
