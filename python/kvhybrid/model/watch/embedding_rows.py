"""A line of each row of the input embedding, to see tokens that were given another vector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from kvhybrid.model.watch.near_weights import read_sums
from kvhybrid.model.watch.samples import is_readable

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

__all__ = ["EmbeddingRows"]

LINE_BYTES: Final = 64
"""How much of an embedding's row is compared: a line of the processor's cache."""


class EmbeddingRows:
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
        self._sums = read_sums(self._addresses, self._lengths)

    @classmethod
    def of(cls, weight: torch.Tensor | None) -> EmbeddingRows | None:
        """Return the rows of a ``weight`` ``[tokens, width]``; None where they cannot be read."""
        if weight is None or weight.device.type != "cpu" or weight.dim() != 2 or not is_readable(weight):
            return None
        has_rows = weight.shape[0] > 0 and weight.shape[1] > 0 and weight.stride(1) == 1
        return cls(weight.detach()) if has_rows else None

    def release(self) -> None:
        """Keep the weight alive no more."""
        self._weight = None

    def is_same(self, tokens: npt.NDArray[np.int64]) -> bool:
        """Return whether the rows of ``tokens`` (int64) are what they were."""
        if self._sums is None:
            return False
        asked = np.zeros(len(self._sums), bool)
        asked[tokens[tokens < len(asked)]] = True
        rows = asked.nonzero()[0]
        found = read_sums(self._addresses[rows], self._lengths[rows])
        return found is not None and np.array_equal(found, self._sums[rows])
