"""Places of a tensor that are compared at every look, spread over its rows and columns."""

from __future__ import annotations

from typing import Final

import torch

__all__ = ["PLAIN", "SAMPLES", "is_readable", "spread"]

SAMPLES: Final = 8
"""Places of each tensor that are compared at every look."""
# Kinds of tensors whose numbers lie where they say.
PLAIN: Final = frozenset({torch.Tensor, torch.nn.Parameter})
# Steps of the samples through a tensor: shares of its length that no row's length divides.
_GOLDEN: Final = 0.6180339887498949


def is_readable(tensor: torch.Tensor) -> bool:
    """Return whether a tensor's numbers lie in memory of its own, all of them, as far as its shape says."""
    if type(tensor) not in PLAIN or tensor.layout is not torch.strided or not tensor.numel():
        return False  # another kind may keep them anywhere
    ends = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    reach = (tensor.storage_offset() + ends + 1) * tensor.element_size()
    return bool(reach <= tensor.untyped_storage().nbytes())


def spread(tensor: torch.Tensor) -> torch.Tensor:
    """Return flat indices of up to ``SAMPLES`` elements, spread over rows and columns.

    Multiples of the golden ratio fall evenly into the tensor and into its rows, whatever their length.
    """
    count = tensor.numel()
    if count <= SAMPLES:
        return torch.arange(count, device="cpu")
    places = [0, count - 1, *(int(count * (index * _GOLDEN % 1.0)) for index in range(1, SAMPLES - 1))]
    return torch.tensor(sorted(set(places)), device="cpu")
