"""What the modules of a model are made of beside their weights, as far as a forward pass depends on it.

Classes and their methods, ``forward`` replaced on an object, plain attributes, hooks. A scan describes all of
it by value where it has one (numbers, text, containers of these) and by a number of its own where it has none
(functions, other objects). It also lists by identity what it has seen, so that ``kvhybrid._core.holds`` can
tell later at little cost that all of it is still there. Knows Python objects; no pages, and no contents of
tensors.
"""

from __future__ import annotations

import functools
import itertools
import sys
import types
from array import array
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import torch
from torch.nn.modules import module as torch_module

from kvhybrid.model.watch.changing import WHOLE
from kvhybrid.model.watch.classes import Classes
from kvhybrid.model.watch.functions import Functions
from kvhybrid.model.watch.objects import PLAIN, UNSET, objects
from kvhybrid.model.watch.slots import slots_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from kvhybrid.model.watch.changing import Changing
    from kvhybrid.model.watch.objects import Number

__all__ = ["ModuleScan"]

# Dictionaries of a module that a forward pass runs over. Others of torch's own serve training and saving.
HOOKS: Final = ("_forward_pre_hooks", "_forward_hooks")
_TENSORS: Final = ("_parameters", "_buffers")
_HELD: Final = ("_modules", *_TENSORS, *HOOKS)
# Torch's own bookkeeping of a module, which no forward pass reads.
_IGNORED: Final = frozenset(
    {
        "_backward_hooks",
        "_output_capturing_hooks_installed",
        "_backward_pre_hooks",
        "_forward_hooks_always_called",
        "_is_full_backward_hook",
        "_load_state_dict_post_hooks",
        "_load_state_dict_pre_hooks",
        "_non_persistent_buffers_set",
        "_state_dict_hooks",
        "_state_dict_pre_hooks",
        # What a model is called, and how its text is chosen: nothing that K and V depend on.
        "generation_config",
        "warnings_issued",
        "_keys_to_ignore_on_save",
        "name_or_path",
        "_name_or_path",
        "use_cache",
        "return_dict",
        "id2label",
        "label2id",
        "pad_token_id",
        "eos_token_id",
        "bos_token_id",
    }
)
# Hooks of every module of the process.
_GLOBAL_HOOKS: Final = ("_global_forward_pre_hooks", "_global_forward_hooks")
# Where the hooks are made that stay on a model once it was asked for hidden states. They only read.
_COLLECTING: Final = "transformers.utils.output_capturing"
# How deep containers and objects are followed, and how many items of one attribute.
_MOST_DEPTH: Final = 5
_MOST_ITEMS: Final = 4096
_ANY: Final = ...
# Libraries whose objects are not looked into: what they keep inside says nothing of a forward pass.
_CLOSED: Final = (sys.stdlib_module_names - {"__main__", "argparse", "collections", "types"}) | {
    "anyio", "kvhybrid", "numpy", "tokenizers", "torch", "trio"
}  # fmt: skip

Container: TypeAlias = "dict[Any, Any] | list[Any] | set[Any] | types.MappingProxyType[str, Any]"


class ModuleScan:
    """One look at every module of a model.

    ``facts`` describe what was found, ``tensors`` are to be watched.

    ``held``: objects without a value that an earlier scan numbered. ``changing``: attributes to leave out.
    ``is_ours``: tells which of the root's attributes an attachment has set. ``own``: what stood there before.
    """

    def __init__(
        self,
        root: torch.nn.Module,
        *,
        changing: Changing,
        held: dict[int, tuple[object, Number]],
        own: dict[str, Any] | None = None,
        is_ours: Callable[[str, object], bool] = lambda _, __: False,
        name: Callable[[object, dict[int, tuple[object, Number]]], object] = objects.number,
    ) -> None:
        self.modules: list[torch.nn.Module] = []
        self.types: list[type] = []
        self.containers: list[Container] = []
        self.items: list[dict[Any, Any]] = []
        self.tensors: list[torch.Tensor] = []
        self.is_exact = True
        """Whether ``holds`` sees every change. Modules of compiled code keep theirs out of its sight."""
        self.held: dict[int, tuple[object, Number]] = {}
        self._known_held = held
        self._changing = changing
        self._name_of = name
        self._own, self._is_ours = own or {}, is_ours
        self._index: dict[int, int] = {}
        self._registers: set[int] = set()
        self._seen_tensors: dict[int, int] = {}
        self._seen_containers: dict[int, int] = {}
        self._functions = Functions(self._number, self._describe, changing)
        self._classes = Classes(self._functions, self._attribute)
        self._slots: list[Any] = []
        self._named: set[int] = set()
        self._depth = self._left = 0
        self._add_module(root)
        self._others: list[tuple[Container, dict[Any, Any]]] = []
        described = [self._module(module) for module in self.modules]  # which grow on the way
        self.facts = (*described, self._global_hooks())
        self.entries: list[Any] = [*self._functions.entries, *self._classes.entries, *self._slots]
        # After the modules' own attributes, which come first and one for each module.
        self.containers += [container for container, _ in self._others]
        self.items += [items for _, items in self._others]
        self.containers += self._classes.attributes
        self.items += [{} for _ in self._classes.attributes]
        self.counts = array("q", map(len, self.containers))
        self.contents = list(itertools.chain.from_iterable(map(_flat, self.containers, self.items)))

    def holds_arguments(self) -> tuple[Any, ...]:
        """Return what ``kvhybrid._core.holds`` is asked with."""
        return self.modules, self.types, self.containers, self.counts, self.contents, self.entries

    def found(self) -> Iterator[tuple[Any, Any, Any]]:
        """Yield what was looked up outside of containers: place, name and value."""
        each = iter(self.entries)
        return zip(each, each, each, strict=True)

    def _add_module(self, module: torch.nn.Module) -> int:
        index = self._index.get(id(module))
        if index is None:
            index = self._index[id(module)] = len(self.modules)
            self.modules.append(module)
            self.types.append(type(module))
        return index

    def _module(self, module: torch.nn.Module) -> object:
        own = vars(module)
        is_root = module is self.modules[0]
        items: dict[Any, Any] = {}
        found: list[tuple[str, object]] = []
        self.containers.append(own)
        self.items.append(items)
        self._named.add(id(own))
        for key, value in list(own.items()):
            if key in _IGNORED or (own, key) in self._changing:
                items[key] = _ANY
                continue
            items[key] = value
            if is_root and self._is_ours(key, value):
                continue
            if key in _HELD and isinstance(value, dict):
                continue
            if key == "forward" and _is_own_forward(module, value):
                continue
            found.append((key, self._attribute(value)))
        if is_root:
            found += [(key, self._attribute(value)) for key, value in self._own.items() if key == "forward"]
        found.sort(key=lambda pair: pair[0])
        self._depth, self._left = 0, _MOST_ITEMS
        return self._classes.describe(type(module)), tuple(found), self._registered(module)

    def _registered(self, module: torch.nn.Module) -> object:
        """Describe the modules, tensors and hooks of a module."""
        facts: list[object] = []
        for name in _HELD:
            held: Any = getattr(module, name)
            values = dict(held.items())
            own = vars(module).get(name)
            if isinstance(own, dict) and own is held:
                self._registers.add(id(own))
                self._keep(own, values)
            else:
                self.is_exact = False
            if name == "_modules":
                facts.append(
                    tuple((k, None if m is None else self._add_module(m)) for k, m in values.items())
                )
            elif name in _TENSORS:
                facts.append(tuple((k, None if t is None else self._tensor(t)) for k, t in values.items()))
            elif values and (hooks := self._hooks(values, vars(module).get(f"{name}_with_kwargs"))):
                facts.append((name, hooks))
        return tuple(facts)

    def has_names(self, container: object) -> bool:
        """Return whether a container is the attributes of an object."""
        return id(container) in self._named

    def registers(self, container: object) -> bool:
        """Return whether a container is where a module keeps its modules, tensors or hooks."""
        return id(container) in self._registers

    def _hooks(self, hooks: dict[int, object], with_kwargs: object) -> tuple[object, ...]:
        flagged = with_kwargs if isinstance(with_kwargs, dict) else {}
        if isinstance(with_kwargs, dict):
            self._keep(with_kwargs, dict(with_kwargs))
        return tuple(
            (self._attribute(hook), bool(flagged.get(number)))
            for number, hook in hooks.items()
            if getattr(hook, "__module__", "") != _COLLECTING
        )

    def _global_hooks(self) -> object:
        found = []
        for name in _GLOBAL_HOOKS:
            hooks = getattr(torch_module, name, None)
            if isinstance(hooks, dict):
                self._keep(hooks, dict(hooks))
                found.append(self._hooks(hooks, getattr(torch_module, f"{name}_with_kwargs", None)))
        return tuple(found)

    def _attribute(self, value: object) -> object:
        self._depth, self._left = 0, _MOST_ITEMS
        return self._describe(value)

    def _describe(self, value: object) -> object:
        if isinstance(value, PLAIN):
            return type(value).__name__, repr(value)
        if isinstance(value, Enum):
            return self._number(type(value)), value.name
        if isinstance(value, torch.Tensor):
            return "tensor", self._tensor(value)
        if isinstance(value, torch.nn.Module):
            return "module", self._add_module(value)
        if isinstance(value, types.MethodType):
            return "method", self._describe(value.__func__), self._describe(value.__self__)
        if isinstance(value, types.BuiltinFunctionType | type):
            return "function", self._number(value)
        self._left -= 1
        if self._depth >= _MOST_DEPTH or self._left < 0:
            return "object", self._number(value)
        self._depth += 1
        try:
            if isinstance(value, types.FunctionType):
                return self._functions.describe(value)
            return self._describe_inside(value)
        finally:
            self._depth -= 1

    def _describe_inside(self, value: Any) -> object:
        if isinstance(value, functools.partial):
            parts = (value.func, value.args, value.keywords)
            return "partial", tuple(self._describe(part) for part in parts)
        if isinstance(value, tuple):
            return type(value).__name__, tuple(self._describe(item) for item in value)
        if isinstance(value, set | frozenset):
            items = list(value)
            if not all(isinstance(item, PLAIN) for item in items):
                return "object", self._number(value)
            described = tuple(sorted(map(repr, items)))
            if isinstance(value, frozenset):
                return "set", described
            return "set", self._within(value, dict.fromkeys(items), lambda: described)
        if isinstance(value, list):
            items = list(value)
            return "list", self._within(
                value, dict(enumerate(items)), lambda: tuple(map(self._describe, items))
            )
        if isinstance(value, dict):
            return type(value).__name__, self._dictionary(value)
        if isinstance(value, np.ndarray):
            tensor = _as_tensor(value)
            return "array", self._number(value) if tensor is None else self._tensor(tensor)
        if isinstance(value, deque | bytearray | array):
            self.is_exact = False  # no one can see from outside that their items change
            return type(value).__name__, tuple(self._describe(item) for item in value)
        return self._object(value)

    def _object(self, value: object) -> object:
        kind = type(value)
        if kind.__module__.split(".", 1)[0] in _CLOSED:
            return "object", self._number(value)
        inside: object = getattr(value, "__dict__", None)
        slots = list(slots_of(value))
        if not isinstance(inside, dict) and not slots:
            return "object", self._number(value)
        is_settings = hasattr(kind, "to_dict") or hasattr(kind, "__dataclass_fields__")
        facts: list[object] = [self._number(kind), None if is_settings else self._number(value)]
        for name, item in slots:
            if (value, name) not in self._changing:
                self._slots += (value, name, item)
                facts.append((name, None if item is UNSET else self._describe(item)))
        if isinstance(inside, dict):
            self._named.add(id(inside))
            facts.append(self._dictionary(inside))
        return "object", tuple(facts)

    def _dictionary(self, held: dict[Any, Any]) -> object:
        pairs = list(held.items())
        items = {
            key: _ANY if key in _IGNORED or (held, key) in self._changing else value for key, value in pairs
        }

        def describe() -> object:
            return tuple(
                (repr(key) if isinstance(key, PLAIN) else self._describe(key), self._describe(items[key]))
                for key, _ in pairs
                if items[key] is not _ANY
            )

        return self._within(held, items, describe)

    def _within(self, container: Container, items: dict[Any, Any], describe: Callable[[], object]) -> object:
        """Describe a container once; one that is met again is named by its place."""
        if (container, WHOLE) in self._changing:
            return "changing"
        if id(container) in self._seen_containers:
            return "again", self._seen_containers[id(container)]
        self._seen_containers[id(container)] = len(self._seen_containers)
        self._keep(container, items)
        return describe()

    def _keep(self, container: Container, items: dict[Any, Any]) -> None:
        self._others.append((container, items))

    def _tensor(self, tensor: torch.Tensor) -> int:
        index = self._seen_tensors.get(id(tensor))
        if index is None:
            index = self._seen_tensors[id(tensor)] = len(self.tensors)
            self.tensors.append(tensor)
        return index

    def _number(self, item: object) -> object:
        if (known := self._known_held.get(id(item))) is not None and known[0] is item:
            self.held[id(item)] = known
        return self._name_of(item, self.held)


def _is_own_forward(module: torch.nn.Module, value: object) -> bool:
    """Return whether ``forward`` on the object is the class's own: some libraries leave it so behind them."""
    function = getattr(value, "__func__", None)
    return (
        function is not None
        and function is type(module).forward
        and getattr(value, "__self__", None) is module
    )


def _as_tensor(value: np.ndarray[Any, Any]) -> torch.Tensor | None:
    """Return an array's numbers as a tensor over the same memory; None for what is no tensor's."""
    if not value.flags.writeable:
        return None
    try:
        return torch.from_numpy(value)
    except (TypeError, ValueError):
        return None


def _flat(container: Container, items: dict[Any, Any]) -> Iterable[Any]:
    if isinstance(container, set):
        return items
    if isinstance(container, dict):
        return itertools.chain.from_iterable(items.items())
    return items.values()
