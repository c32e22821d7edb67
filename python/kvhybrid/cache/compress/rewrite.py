"""Writing what is kept of a text into fresh pages that nobody else ever finds.

Shared pages are read and never written: whoever stands on them sees no change. Knows pages and sequences;
which tokens are kept is for a scorer to say, and why for the caller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvhybrid._core import Batch
from kvhybrid.cache.compress.selection import choose, gather
from kvhybrid.cache.page_table import PageTable
from kvhybrid.cache.step import Step

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt
    import torch

    from kvhybrid._core import PagePool, Sequence
    from kvhybrid.cache.pages import PageStorage

    Score = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]
    """``(layer, row, keys, values) -> scores``, of one row: float32 ``[1, num_kv_heads, tokens, width]`` in,
    ``[1, num_kv_heads, tokens]`` out."""
    Note = Callable[[int, int, torch.Tensor], None]
    """``(layer, row, places)``, of one row: what stays, int64 ``[1, num_kv_heads, count]``, ascending."""


class Source(NamedTuple):
    """A text to be rewritten: its sequence, and what the new one knows in place of its tokens."""

    sequence: Sequence
    tokens: npt.NDArray[np.uint32]
    """As many as are kept. Where heads keep different tokens these are placeholders."""


def rewrite(
    storage: PageStorage, pool: PagePool, sources: list[Source], score: Score, note: Note | None = None
) -> list[Sequence]:
    """Return new, private sequences that hold what the scores keep of each source, layer by layer.

    ``note`` is told what that is. The sources are as before, and stay open. Raises ``CapacityError`` without
    room for both; then, as after any other failure, nothing of it is left.
    """
    nothing = np.empty(0, np.uint32)
    fresh = [pool.open(nothing, reuse=False, share=False) for _ in sources]
    try:
        for sequence, source in zip(fresh, sources, strict=True):
            sequence.append(source.tokens)
        batch, chosen = Batch(pool, fresh), _Chosen(storage, sources, score, note)
        counts = np.array([len(source.tokens) for source in sources], np.int32)
        # No more at once than a forward pass writes: there are few pages of full precision where others are
        # quantized, and each part has to lie in them before it can step down.
        most, done = storage.most_new(len(sources)) or int(counts.max()), 0
        while done < counts.max():
            part = (counts - done).clip(0, most)
            step = Step.plan(storage, batch, part, places=[(row, 0) for row in range(len(sources))])
            try:
                for layer in storage.layout.kept_layers:
                    step.write(layer, *chosen.read(layer, done, part))
            except BaseException:
                step.abandon()
                raise
            step.commit()
            done += most
    except BaseException:
        for sequence in fresh:
            sequence.close()
        raise
    return fresh


class _Chosen:
    """What is kept of the sources, a part at a time; chosen once a layer and row."""

    def __init__(self, storage: PageStorage, sources: list[Source], score: Score, note: Note | None) -> None:
        self._storage = storage
        self._sources = sources
        self._score = score
        self._note = note
        self._places: dict[tuple[int, int], torch.Tensor] = {}

    def read(
        self, layer: int, start: int, counts: npt.NDArray[np.int32]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a layer's kept tokens from ``start`` on, ``[rows, num_kv_heads, most of counts, width]``."""
        pools = self._storage.keys[layer], self._storage.values[layer]
        width = int(counts.max())
        kept = [pool.new_zeros((len(counts), pool.shape[1], width, pool.shape[3])) for pool in pools]
        for row, count in enumerate(counts.tolist()):
            if count == 0:
                continue
            states = self._states(layer, row)
            if (layer, row) not in self._places:
                self._places[layer, row] = self._choose(layer, row, *states)
            places = self._places[layer, row][:, :, start : start + count]
            for target, each in zip(kept, states, strict=True):
                target[row : row + 1, :, :count] = gather(each, places)
        return kept[0], kept[1]

    def _states(self, layer: int, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        sequence = self._sources[row].sequence
        keys, values = (
            pool.new_empty((1, pool.shape[1], sequence.length, pool.shape[3]))
            for pool in (self._storage.keys[layer], self._storage.values[layer])
        )
        with self._storage.still:
            table = PageTable.of(sequence)
            self._storage.gather(layer, table, 0, sequence.length, (keys[0], values[0]))
        return keys, values

    def _choose(self, layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        scores = self._score(layer, row, keys.float(), values.float())
        places = choose(scores, len(self._sources[row].tokens))
        if self._note is not None:
            self._note(layer, row, places)
        return places
