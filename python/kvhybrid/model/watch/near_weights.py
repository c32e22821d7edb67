"""What lies in tensors on the CPU: samples and sums, read by address through the operating system.

A thread that frees a weight meanwhile makes a read fail, and nothing else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from kvhybrid._core import read_at, sums_at
from kvhybrid.model.watch.samples import spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    import torch

    Numbers = npt.NDArray[np.int64]

__all__ = ["BLOCK_BYTES", "Samples", "blocks_of", "read", "read_sums", "samples_of"]

BLOCK_BYTES: Final = 1 << 16
"""What is summed at once."""


class Samples(NamedTuple):
    """Pieces of memory and what lay there."""

    addresses: Numbers
    lengths: Numbers
    values: bytes | None


def samples_of(tensors: Sequence[torch.Tensor]) -> Samples:
    """Return samples of tensors on the CPU, by address."""
    addresses: list[npt.NDArray[np.int64]] = []
    lengths: list[npt.NDArray[np.int64]] = []
    for tensor in tensors:
        flat = spread(tensor).numpy()
        offsets = np.zeros(len(flat), np.int64)
        for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
            flat, at = np.divmod(flat, size)
            offsets += at * stride
        addresses.append(tensor.data_ptr() + offsets * tensor.element_size())
        lengths.append(np.full(len(offsets), tensor.element_size(), np.int64))
    joined = [np.concatenate(each) if each else np.empty(0, np.int64) for each in (addresses, lengths)]
    return Samples(joined[0], joined[1], read(joined[0], joined[1]))


def blocks_of(tensors: Sequence[torch.Tensor]) -> tuple[Numbers, Numbers]:
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


def read(addresses: Numbers, lengths: Numbers) -> bytes | None:
    """Return what lies at addresses; None where that cannot be told, for example without file descriptors."""
    try:
        return read_at(addresses, lengths)
    except OSError:
        return None


def read_sums(addresses: Numbers, lengths: Numbers) -> npt.NDArray[np.uint64] | None:
    """Return a sum of each piece; None as ``_read`` does."""
    try:
        found = sums_at(addresses, lengths)
    except OSError:
        return None
    return None if found is None else np.frombuffer(found, np.uint64)
