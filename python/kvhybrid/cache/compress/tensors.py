"""Old context of a ``process_kv`` session: which positions each head keeps, and where they lie then.

There are no turns here. A session is compressed when every layer has come to the same end and a page's worth
of tokens would go, so that one token at a time costs little; what a call returns is what was stored before.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np
import torch

from kvhybrid.cache.compress.rewrite import Source, rewrite
from kvhybrid.cache.compress.scorers import SCORERS
from kvhybrid.cache.compress.selection import RECENT, kept_tokens

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvhybrid._core import PagePool, Sequence
    from kvhybrid.cache.pages import PageStorage
    from kvhybrid.presets import CompressionScorer


class KeptFront(NamedTuple):
    """A session's compressed beginning: the same number of positions in every row, head and layer."""

    length: int = 0
    """Positions that it stands for."""
    stored: int = 0
    """How many of them each head has."""
    positions: Mapping[int, torch.Tensor] = MappingProxyType({})
    """Which: int64 ``[batch, num_kv_heads, stored]`` of each layer, ascending."""

    @property
    def removed(self) -> int:
        """Positions that are no longer there."""
        return self.length - self.stored

    def held(self, layer: int, end: int) -> torch.Tensor | None:
        """Return the positions of a layer's K and V up to ``end``, as they are read; None when all are."""
        if self.removed == 0:
            return None
        front = self.positions[layer]
        behind = torch.arange(self.length, end, device=front.device)
        return torch.cat([front, behind.expand(*front.shape[:2], -1)], dim=2)


NOTHING_REMOVED: Final = KeptFront()


def shorten(
    storage: PageStorage,
    pool: PagePool,
    rows: list[Sequence],
    front: KeptFront,
    length: int,
    rule: tuple[float, CompressionScorer],
) -> tuple[list[Sequence], KeptFront] | None:
    """Return new rows with what is kept of ``length`` positions; None when less than a page would go.

    ``rule``: the share of old tokens to keep, and how they are scored. The old rows stay open. Raises
    ``CapacityError`` without room for both.
    """
    share, scorer = rule
    stored = length - front.removed
    count = min(kept_tokens(length, share), stored)
    if stored - count < storage.block_size:
        return None
    # The last ones are stored whole, in order: nothing that is kept here was ever old.
    cut = length - RECENT
    chosen: dict[int, list[torch.Tensor]] = {}

    def score(layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        del layer, row
        return SCORERS[scorer](keys, values, None)

    def note(layer: int, row: int, places: torch.Tensor) -> None:
        before = front.held(layer, length)
        kept = places[:, :, : count - RECENT]
        kept = kept if before is None else before[row : row + 1].gather(2, kept)
        chosen.setdefault(layer, []).append(kept)

    tokens = np.zeros(count, np.uint32)
    fresh = rewrite(storage, pool, [Source(row, tokens) for row in rows], score, note)
    positions = {layer: torch.cat(each) for layer, each in chosen.items()}
    return fresh, KeptFront(cut, count - RECENT, positions)
