"""Texts made shorter: what scores keep of each, rewritten into pages of its own behind a new front.

Knows sequences, their fronts and how many tokens are to stay; not whose they are, nor when.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvhybrid.cache.compress.rewrite import Source, rewrite
from kvhybrid.cache.compress.selection import RECENT, kept_tokens
from kvhybrid.model.compressed import Front

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from kvhybrid._core import Sequence
    from kvhybrid.cache.kv_cache import KVCache
    from kvhybrid.model.rows import Text

    Score = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]
    """As ``cache.compress.rewrite`` has it."""


class Computed(NamedTuple):
    """A text that was computed: where it lies, its tokens, and what stands for its beginning."""

    sequence: Sequence
    """Without pending tokens."""
    text: Text
    front: Front

    def kept(self, share: float) -> int:
        """Return how many tokens stay when ``share`` of the whole text's old ones do; never more than are."""
        return min(kept_tokens(len(self.text), share), self.sequence.length)


def removable(texts: list[Computed], share: float) -> int:
    """Return how many tokens of all rows go when ``share`` of the old ones stays."""
    return sum(each.sequence.length - each.kept(share) for each in texts)


def shorten(cache: KVCache, texts: list[Computed], share: float, score: Score) -> list[Computed]:
    """Return the same texts with fewer tokens stored, in pages of their own; the originals stay open.

    Counted as one compression. Raises ``CapacityError`` without room for both; nothing has changed then.
    """
    fronts, sources = [], []
    for each in texts:
        count = each.kept(share)
        # Of these, every head has every token, in order: behind the front before, and among the last.
        behind = min(RECENT, len(each.text) - len(each.front.text))
        cut = len(each.text) - behind
        fronts.append(Front(each.text[:cut], count - behind))
        kept = np.append(np.zeros(count - behind, np.uint32), each.text[cut:])
        sources.append(Source(each.sequence, kept))
    removed = removable(texts, share)
    fresh = rewrite(cache.storage, cache.pool, sources, score)
    cache.compressed.compressed(removed, removed * cache.layout.bytes_per_token)
    return [
        Computed(sequence, each.text, front)
        for sequence, each, front in zip(fresh, texts, fronts, strict=True)
    ]
