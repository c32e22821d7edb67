"""``Snapshot``: a model's modules, hooks and weights as they were, to see at a glance that they still are.

Says that nothing has changed, or that something may have. What it was, and whether it counts, is for
``kvhybrid.model.weights`` to find out.
"""

from __future__ import annotations

import itertools
from array import array
from operator import attrgetter
from typing import TYPE_CHECKING, Final, NamedTuple, Self

import numpy as np
import torch

from kvhybrid._core import holds, read_at

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy.typing as npt

# Values of each weight that are compared.
SAMPLES: Final = 8
# Kinds of tensors whose numbers lie where they say.
PLAIN: Final = frozenset({torch.Tensor, torch.nn.Parameter})
# Where a module keeps what a forward pass runs over.
HELD: Final = ("_modules", "_parameters", "_buffers", "_forward_pre_hooks", "_forward_hooks")

_dtype, _shape, _version = attrgetter("dtype"), attrgetter("shape"), attrgetter("_version")


class _Samples(NamedTuple):
    """Addresses of values in the weights of one width, and what lay there."""

    addresses: npt.NDArray[np.int64]
    width: int
    values: bytes


class Snapshot:
    """What a list of modules held when it was made. Keeps all of it: no address can become another's."""

    def __init__(self, modules: list[torch.nn.Module], weights: list[torch.Tensor]) -> None:
        self.modules = modules
        self._dicts = [getattr(module, name) for module in modules for name in HELD]
        self._values = [value for held in self._dicts for value in held.values()]
        self._weights = weights
        self._counted = [weight for weight in weights if not weight.is_inference()]
        near = [weight for weight in weights if weight.device.type == "cpu"]
        # What is read by address is held: another thread may give a weight other data at any moment.
        self._held = [weight.detach() for weight in near if weight.is_floating_point()]
        self._near = _samples(self._held)
        self._views = views(weight for weight in weights if weight.device.type != "cpu")
        self._far = [torch.cat(each) for each in self._views]
        self._facts = self._facts_now()

    @classmethod
    def of(cls, modules: list[torch.nn.Module], weights: list[torch.Tensor]) -> Self | None:
        """Return a snapshot, or None where it could not be told from one that is no longer true.

        That is where modules are compiled code, or weights lie elsewhere and come when they are needed, or
        are tensors of a kind that keeps its numbers somewhere else (quantized, sharded).
        """
        if any(weight.is_meta for weight in weights):
            return None
        near = [weight for weight in weights if weight.device.type == "cpu" and weight.is_floating_point()]
        if not all(map(_is_readable, near)):
            return None
        if not all(isinstance(getattr(module, name), dict) for module in modules for name in HELD):
            return None
        made = cls(modules, weights)
        # Given other data meanwhile, it would hold samples of one and the place of the other.
        has_held = all(now.data_ptr() == held.data_ptr() for now, held in zip(near, made._held, strict=True))
        return made if has_held else None

    def has_same_modules(self) -> bool:
        """Return True when modules, hooks and weights are the same objects in the same places."""
        return holds(self.modules, HELD, self._dicts, self._values)

    def is_same(self) -> bool:
        """Return True when nothing has changed: objects, places and kinds of weights, versions, samples."""
        if not self.has_same_modules() or self._facts_now() != self._facts:
            return False
        # Only behind this are the addresses known to be good.
        for addresses, width, values in self._near:
            if read_at(addresses, width) != values:
                return False
        return not self._far or self._views_are_same()

    @torch.no_grad()
    def _views_are_same(self) -> bool:
        return all(torch.equal(torch.cat(now), far) for now, far in zip(self._views, self._far, strict=True))

    def _facts_now(self) -> tuple[object, ...]:
        """Return where and how weights lie, their dtypes and versions; in few pieces, for they lie cold."""
        places = array("Q", map(torch.Tensor.data_ptr, self._weights))
        dims = array("q", map(torch.Tensor.dim, self._weights))
        shapes = array("q", itertools.chain.from_iterable(map(_shape, self._weights)))
        strides = array("q", itertools.chain.from_iterable(map(torch.Tensor.stride, self._weights)))
        try:
            versions = array("q", map(_version, self._counted))
        except RuntimeError:  # one took over the data of an inference tensor, whose writes nobody counts
            versions = array("q")
        return places, [*map(_dtype, self._weights)], dims, shapes, strides, versions


def views(tensors: Iterable[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Return a view of a few values of every plain contiguous tensor of floats, by device and dtype."""
    found: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in filter(_can_be_sampled, tensors):
        place = found.setdefault((tensor.device, tensor.dtype), [])
        place.append(tensor.detach().as_strided((SAMPLES,), (tensor.numel() // SAMPLES,)))
    return list(found.values())


def _samples(tensors: Iterable[torch.Tensor]) -> list[_Samples]:
    """Return the same values of tensors on the CPU, by address."""
    found: dict[int, list[npt.NDArray[np.int64]]] = {}
    for tensor in filter(_can_be_sampled, tensors):
        width = tensor.element_size()
        apart = tensor.numel() // SAMPLES * width
        found.setdefault(width, []).append(tensor.data_ptr() + apart * np.arange(SAMPLES, dtype=np.int64))
    joined = ((width, np.concatenate(each)) for width, each in found.items())
    return [_Samples(addresses, width, read_at(addresses, width)) for width, addresses in joined]


def _can_be_sampled(tensor: torch.Tensor) -> bool:
    is_dense = tensor.is_floating_point() and tensor.layout is torch.strided and tensor.is_contiguous()
    return is_dense and tensor.numel() >= SAMPLES and _is_readable(tensor)


def _is_readable(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's numbers lie in memory of its own, all of them, as far as its shape says."""
    if type(tensor) not in PLAIN or tensor.layout is not torch.strided:
        return False  # another kind may keep them anywhere
    ends = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    reach = (tensor.storage_offset() + ends + 1) * tensor.element_size() if tensor.numel() else 0
    return bool(reach <= tensor.untyped_storage().nbytes())
