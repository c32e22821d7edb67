"""What lies in tensors of devices that only torch can read: samples and sums, computed there."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from kvhybrid.model.watch.near_weights import BLOCK_BYTES
from kvhybrid.model.watch.samples import spread

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["FarWeights"]


class Block(NamedTuple):
    """A part of a tensor on another device, as whole numbers, with its sum."""

    tensor: torch.Tensor
    start: int
    stop: int


class FarWeights:
    """Tensors of devices that only torch can read."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = [tensor for tensor in tensors if tensor.numel()]
        self._places = [spread(tensor).to(tensor.device) for tensor in self._tensors]
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


def _at(tensor: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the elements at flat indices."""
    if tensor.is_contiguous():
        return tensor.view(-1)[places]
    return tensor[tuple(torch.unravel_index(places, tensor.shape))]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _far_blocks(tensor: torch.Tensor) -> list[Block]:
    """Return the parts of a tensor, ``BLOCK_BYTES`` each; of one with gaps, whole rows."""
    if tensor.is_contiguous():
        count, flat = BLOCK_BYTES // tensor.element_size(), tensor.view(-1)
        return [Block(flat, at, min(at + count, len(flat))) for at in range(0, len(flat), count)]
    count = max(BLOCK_BYTES * len(tensor) // (tensor.numel() * tensor.element_size()), 1)
    return [Block(tensor, at, min(at + count, len(tensor))) for at in range(0, len(tensor), count)]


@torch.no_grad()
def _far_sum(block: Block) -> torch.Tensor:
    """Return a sum of a block, weighted by odd numbers modulo 2^64: every byte and its place count."""
    numbers = block.tensor[block.start : block.stop].contiguous().view(-1).view(torch.uint8).to(torch.int64)
    # Multiplying by an odd number loses nothing: two blocks that differ in one byte differ in their sums.
    weights = (
        torch.arange(1, 2 * len(numbers), 2, device=numbers.device, dtype=torch.int64) * 0x5851F42D4C957F2D
    )
    return (numbers * weights).sum()
