"""``WeightWatch``: whether numbers in the weights of a model are what they were.

Identity, place, shape and torch's count of writes tell most changes. Writes that nothing counts (``.data``,
fused optimizers, other processes) are found by their bytes: samples of every tensor at each look, the rows of
a prompt's tokens in the embedding, and one block after the other of everything, so that no write stays unseen
for long.

Memory on the CPU is read through the operating system (``kvhybrid._core.read_at``): a thread that frees a
weight meanwhile makes a read fail, and nothing else. Memory of other devices is read by torch.
"""

from __future__ import annotations

import itertools
import time
import weakref
from array import array
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from kvhybrid.model.watch.embedding_rows import EmbeddingRows
from kvhybrid.model.watch.far_weights import FarWeights
from kvhybrid.model.watch.near_weights import blocks_of, read, read_sums, samples_of
from kvhybrid.model.watch.samples import PLAIN, is_readable

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Numbers = npt.NDArray[np.int64]

ROUND_S: Final = 300.0
"""A busy service looks at all blocks within this time, as long as ``MOST_BLOCKS`` a look suffice for that."""
MOST_BLOCKS: Final = 64
"""Blocks of one look at most: 4 MiB, well under a millisecond."""


class WeightWatch:
    """The state of ``tensors`` when this was made.

    Keeps what it reads alive, also once other data takes its place.
    ``embedding``: the input embedding's weight, whose rows ``has_same_rows`` compares.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], embedding: torch.Tensor | None = None) -> None:
        self.tensors = [tensor for tensor in tensors if not tensor.is_meta]
        self._counted = [tensor for tensor in self.tensors if not tensor.is_inference()]
        # Before anything is read: a write from now on shows in what is read next.
        self._facts = self._facts_now()
        self._held = [
            part.detach() for tensor in self.tensors for part in _parts(tensor) if is_readable(part)
        ]
        near = [tensor for tensor in self._held if tensor.device.type == "cpu"]
        self._samples = samples_of(near)
        self._blocks = blocks_of(near)
        self._sums = read_sums(*self._blocks)
        self._far = FarWeights([tensor for tensor in self._held if tensor.device.type != "cpu"])
        self._rows = EmbeddingRows.of(embedding)
        self._released: list[weakref.ref[torch.Tensor]] = []
        self._next = 0
        self._looked_at = time.monotonic()

    @property
    def num_blocks(self) -> int:
        """Blocks that a round goes through, of all devices."""
        return len(self._blocks[0]) + len(self._far.blocks)

    def is_same(self) -> bool:
        """Return whether the tensors are what they were, as far as one look sees.

        Places, shapes, dtypes, counts of writes and samples of all tensors, and the next blocks of their
        bytes.
        """
        if self._facts_now() != self._facts:
            return False
        samples = self._samples
        found = read(samples.addresses, samples.lengths)
        if found is None or found != samples.values:
            return False
        return self._far.has_same_samples() and self._has_same_blocks()

    def release(self) -> None:
        """Keep no tensor alive any more. Only ``resume`` makes sense afterwards."""
        self._released = [weakref.ref(tensor) for tensor in self.tensors]
        self.tensors, self._counted, self._held, self._far = [], [], [], FarWeights([])
        if self._rows is not None:
            self._rows.release()

    def resume(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Watch ``tensors`` again, if these are the very ones and every byte of them is what it was.

        Those of other devices count as changed: nothing of them was kept.
        """
        now = [tensor for tensor in tensors if not tensor.is_meta]
        known = [tensor() for tensor in self._released]
        if len(now) != len(known) or any(a is not b for a, b in zip(now, known, strict=True)):
            return False
        if any(tensor.device.type != "cpu" for tensor in now):
            return False
        self.tensors = now
        self._counted = [tensor for tensor in now if not tensor.is_inference()]
        self._held = [part.detach() for tensor in now for part in _parts(tensor) if is_readable(part)]
        found = read_sums(*self._blocks)
        if found is None or self._sums is None or not np.array_equal(found, self._sums):
            return False
        return self.is_same()

    def has_same_rows(self, tokens: Numbers) -> bool:
        """Return whether the embedding's rows of ``tokens`` (int64) are what they were."""
        return self._rows is None or self._rows.is_same(tokens)

    def _has_same_blocks(self) -> bool:
        """Sum the blocks that are due, and compare."""
        now = time.monotonic()
        total, passed, self._looked_at = self.num_blocks, now - self._looked_at, now
        if not total:
            return True
        due = min(max(1, int(total * passed / ROUND_S) + 1), MOST_BLOCKS, total)
        first, self._next = self._next, (self._next + due) % total
        chosen = np.arange(first, first + due) % total
        near = chosen[chosen < len(self._blocks[0])]
        if len(near):
            addresses, lengths = self._blocks
            found = read_sums(addresses[near], lengths[near])
            if found is None or self._sums is None or not np.array_equal(found, self._sums[near]):
                return False
        return self._far.has_same_blocks(
            (chosen[chosen >= len(self._blocks[0])] - len(self._blocks[0])).tolist()
        )

    def _facts_now(self) -> tuple[object, ...]:
        """Return places, dtypes, shapes and counts of writes, in few flat arrays."""
        tensors = self.tensors
        places = array("Q", map(_place, tensors))
        dims = array("q", map(torch.Tensor.dim, tensors))
        shapes = array("q", itertools.chain.from_iterable(tensor.shape for tensor in tensors))
        strides = array("q", itertools.chain.from_iterable(map(_strides, tensors)))
        try:
            versions = array("q", [tensor._version for tensor in self._counted])
        except RuntimeError:  # one has the data of an inference tensor now, whose writes are not counted
            versions = array("q")
        return places, [tensor.dtype for tensor in tensors], dims, shapes, strides, versions


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors that a tensor's numbers lie in: itself, or what a wrapper is made of."""
    if type(tensor) in PLAIN:
        return [tensor]
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return []
    inner = (getattr(tensor, name, None) for name in flatten()[0])
    return [part for each in inner if isinstance(each, torch.Tensor) for part in _parts(each)]


def _place(tensor: torch.Tensor) -> int:
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # a wrapper without memory of its own
        return id(tensor)


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    return tensor.stride() if tensor.layout is torch.strided else ()
