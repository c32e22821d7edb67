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
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch

from kvhybrid._core import read_at, sums_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Numbers = npt.NDArray[np.int64]

SAMPLES: Final = 8
"""Places of each tensor that are compared at every look."""
BLOCK_BYTES: Final = 1 << 16
"""What is summed at once."""
ROUND_S: Final = 300.0
"""A busy service looks at all blocks within this time, as long as ``MOST_BLOCKS`` a look suffice for that."""
MOST_BLOCKS: Final = 64
"""Blocks of one look at most: 4 MiB, well under a millisecond."""
LINE_BYTES: Final = 64
"""How much of an embedding's row is compared: a line of the processor's cache."""
# Kinds of tensors whose numbers lie where they say.
_PLAIN: Final = frozenset({torch.Tensor, torch.nn.Parameter})
# Steps of the samples through a tensor: shares of its length that no row's length divides.
_GOLDEN: Final = 0.6180339887498949


class _Samples(NamedTuple):
    """Pieces of memory and what lay there."""

    addresses: Numbers
    lengths: Numbers
    values: bytes | None


class _Block(NamedTuple):
    """A part of a tensor on another device, as whole numbers, with its sum."""

    tensor: torch.Tensor
    start: int
    stop: int


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
            part.detach() for tensor in self.tensors for part in _parts(tensor) if _is_readable(part)
        ]
        near = [tensor for tensor in self._held if tensor.device.type == "cpu"]
        self._samples = _samples_of(near)
        self._blocks = _blocks_of(near)
        self._sums = _read_sums(*self._blocks)
        self._far = _FarWeights([tensor for tensor in self._held if tensor.device.type != "cpu"])
        self._rows = _Rows.of(embedding)
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
        found = _read(samples.addresses, samples.lengths)
        if found is None or found != samples.values:
            return False
        return self._far.has_same_samples() and self._has_same_blocks()

    def release(self) -> None:
        """Keep no tensor alive any more. Only ``resume`` makes sense afterwards."""
        self._released = [weakref.ref(tensor) for tensor in self.tensors]
        self.tensors, self._counted, self._held, self._far = [], [], [], _FarWeights([])
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
        self._held = [part.detach() for tensor in now for part in _parts(tensor) if _is_readable(part)]
        found = _read_sums(*self._blocks)
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
            found = _read_sums(addresses[near], lengths[near])
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


class _FarWeights:
    """Tensors of devices that only torch can read."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.numel()]
        self._places = [_spread(tensor).to(tensor.device) for tensor in self._tensors]
        self._samples = self._read_samples()
        self.blocks = [block for tensor in self._tensors for block in _far_blocks(tensor)]
        self._sums = [_far_sum(block) for block in self.blocks]

    @torch.no_grad()
    def _read_samples(self) -> list[torch.Tensor]:
        found: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
        for tensor, places in zip(self._tensors, self._places, strict=True):
            found.setdefault((tensor.device, tensor.dtype), []).append(_at(tensor, places))
        return [torch.cat(each) for each in found.values()]

    def has_same_samples(self) -> bool:
        """Return whether every sample is what it was."""
        if not self._tensors:
            return True
        now = self._read_samples()
        # As bytes: a NaN is equal to itself.
        return all(torch.equal(_bytes(a), _bytes(b)) for a, b in zip(now, self._samples, strict=True))

    def has_same_blocks(self, chosen: Sequence[int]) -> bool:
        """Return whether these blocks have the sums that they had."""
        return all(bool(_far_sum(self.blocks[index]) == self._sums[index]) for index in chosen)


class _Rows:
    """A part of each row of an embedding on the CPU, to see tokens that were given another vector."""

    def __init__(self, weight: torch.Tensor) -> None:
        rows, width = weight.shape
        self._weight: torch.Tensor | None = weight
        row_bytes = width * weight.element_size()
        line = min(LINE_BYTES, row_bytes)
        starts = np.arange(rows, dtype=np.int64)
        # Another part in each row: a change of some columns shows in some rows.
        within = (starts % max(row_bytes // line, 1)) * line
        self._addresses = weight.data_ptr() + starts * weight.stride(0) * weight.element_size() + within
        self._lengths = np.full(rows, line, np.int64)
        self._sums = _read_sums(self._addresses, self._lengths)

    @classmethod
    def of(cls, weight: torch.Tensor | None) -> _Rows | None:
        if weight is None or weight.device.type != "cpu" or weight.dim() != 2 or not _is_readable(weight):
            return None
        has_rows = weight.shape[0] > 0 and weight.shape[1] > 0 and weight.stride(1) == 1
        return cls(weight.detach()) if has_rows else None

    def release(self) -> None:
        self._weight = None

    def is_same(self, tokens: Numbers) -> bool:
        if self._sums is None:
            return False
        asked = np.zeros(len(self._sums), bool)
        asked[tokens[tokens < len(asked)]] = True
        rows = asked.nonzero()[0]
        found = _read_sums(self._addresses[rows], self._lengths[rows])
        return found is not None and np.array_equal(found, self._sums[rows])


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the plain tensors that a tensor's numbers lie in: itself, or what a wrapper is made of."""
    if type(tensor) in _PLAIN:
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


def _is_readable(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's numbers lie in memory of its own, all of them, as far as its shape says."""
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or not tensor.numel():
        return False  # another kind may keep them anywhere
    ends = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    reach = (tensor.storage_offset() + ends + 1) * tensor.element_size()
    return bool(reach <= tensor.untyped_storage().nbytes())


def _spread(tensor: torch.Tensor) -> torch.Tensor:
    """Return flat indices of up to ``SAMPLES`` elements, spread over rows and columns.

    Multiples of the golden ratio fall evenly into the tensor and into its rows, whatever their length.
    """
    count = tensor.numel()
    if count <= SAMPLES:
        return torch.arange(count, device="cpu")
    places = [0, count - 1, *(int(count * (index * _GOLDEN % 1.0)) for index in range(1, SAMPLES - 1))]
    return torch.tensor(sorted(set(places)), device="cpu")


def _samples_of(tensors: Sequence[torch.Tensor]) -> _Samples:
    """Return samples of tensors on the CPU, by address."""
    addresses: list[npt.NDArray[np.int64]] = []
    lengths: list[npt.NDArray[np.int64]] = []
    for tensor in tensors:
        flat = _spread(tensor).numpy()
        offsets = np.zeros(len(flat), np.int64)
        for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            flat, at = np.divmod(flat, size)
            offsets += at * stride
        addresses.append(tensor.data_ptr() + offsets * tensor.element_size())
        lengths.append(np.full(len(offsets), tensor.element_size(), np.int64))
    joined = [np.concatenate(each) if each else np.empty(0, np.int64) for each in (addresses, lengths)]
    return _Samples(joined[0], joined[1], _read(joined[0], joined[1]))


def _blocks_of(tensors: Sequence[torch.Tensor]) -> tuple[Numbers, Numbers]:
    """Return addresses and lengths of blocks that hold every byte of tensors on the CPU, and no others."""
    runs = [_runs_of(tensor) for tensor in tensors]
    starts = np.concatenate([start for start, _ in runs]) if runs else np.empty(0, np.int64)
    lengths = np.concatenate([np.full(len(start), length) for start, length in runs]) if runs else starts
    # Weights that share their memory are summed once.
    starts, lengths = np.unique(np.stack([starts, lengths]), axis=1)
    counts = -(-lengths // BLOCK_BYTES)
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    offsets = within * BLOCK_BYTES
    return np.repeat(starts, counts) + offsets, np.minimum(np.repeat(lengths, counts) - offsets, BLOCK_BYTES)


def _runs_of(tensor: torch.Tensor) -> tuple[Numbers, int]:
    """Return where the runs of neighbouring bytes begin that a tensor lies in, and how long each is."""
    sizes = [
        (stride, size)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        if size > 1 and stride
    ]
    length, offsets = 1, np.zeros(1, np.int64)
    for stride, size in sorted(sizes):
        if stride == length and len(offsets) == 1:
            length *= size
        else:
            offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
    return tensor.data_ptr() + offsets * tensor.element_size(), length * tensor.element_size()


def _read(addresses: Numbers, lengths: Numbers) -> bytes | None:
    """Return what lies at addresses; None where that cannot be told, for example without file descriptors."""
    try:
        return read_at(addresses, lengths)
    except OSError:
        return None


def _read_sums(addresses: Numbers, lengths: Numbers) -> npt.NDArray[np.uint64] | None:
    """Return a sum of each piece; None as ``_read`` does."""
    try:
        found = sums_at(addresses, lengths)
    except OSError:
        return None
    return None if found is None else np.frombuffer(found, np.uint64)


def _at(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the elements at flat indices."""
    if tensor.is_contiguous():
        return tensor.view(-1)[places]
    return tensor[tuple(torch.unravel_index(places, tensor.shape))]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _far_blocks(tensor: torch.Tensor) -> list[_Block]:
    """Return the parts of a tensor, ``BLOCK_BYTES`` each; of one with gaps, whole rows."""
    if tensor.is_contiguous():
        count, flat = BLOCK_BYTES // tensor.element_size(), tensor.view(-1)
        return [_Block(flat, at, min(at + count, len(flat))) for at in range(0, len(flat), count)]
    count = max(BLOCK_BYTES * len(tensor) // (tensor.numel() * tensor.element_size()), 1)
    return [_Block(tensor, at, min(at + count, len(tensor))) for at in range(0, len(tensor), count)]


@torch.no_grad()
def _far_sum(block: _Block) -> torch.Tensor:
    """Return a sum of a block, weighted by odd numbers modulo 2^64: every byte and its place count."""
    numbers = block.tensor[block.start : block.stop].contiguous().view(-1).view(torch.uint8).to(torch.int64)
    # Multiplying by an odd number loses nothing: two blocks that differ in one byte differ in their sums.
    weights = (
        torch.arange(1, 2 * len(numbers), 2, device=numbers.device, dtype=torch.int64) * 0x5851F42D4C957F2D
    )
    return (numbers * weights).sum()
