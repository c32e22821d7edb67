"""``Released``: what a session remembers while it holds no page, the computed tokens of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import torch

if TYPE_CHECKING:
    from kvhybrid.model.rows import Rows, Text


@dataclass(frozen=True, slots=True)
class Released:
    """Rows' tokens, how much padding stands before each, and the columns of all."""

    texts: list[Text]
    pads: list[int]
    columns: int

    @classmethod
    def of(cls, rows: Rows) -> Self:
        """Remember what was computed of ``rows``."""
        return cls([text.copy() for text in rows.held()], list(rows.pads), rows.columns)

    def crop(self, columns: int) -> Released:
        """Return the first ``columns`` columns."""
        kept = min(self.columns, columns)
        texts = [text[: max(kept - pad, 0)] for text, pad in zip(self.texts, self.pads, strict=True)]
        return Released(texts, self.pads, kept)

    def select(self, rows: list[int]) -> Released:
        """Return these rows, in this order."""
        return Released([self.texts[row] for row in rows], [self.pads[row] for row in rows], self.columns)

    def behind(self, column: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``input_ids`` of the columns from ``column`` on, and the ``attention_mask`` of all."""
        ids = np.zeros((len(self.texts), self.columns), np.int64)
        mask = np.zeros_like(ids)
        for index, (pad, text) in enumerate(zip(self.pads, self.texts, strict=True)):
            ids[index, pad:], mask[index, pad:] = text, 1
        return torch.from_numpy(ids[:, column:]), torch.from_numpy(mask)


NOTHING: Final = Released([], [], 0)
