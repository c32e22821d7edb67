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
        width = max(len(source.tokens) for source in sources)
        places = [(row, width - len(source.tokens)) for row, source in enumerate(sources)]
        step = Step.plan(storage, Batch(pool, fresh), places=places)
        try:
            for layer in storage.layout.kept_layers:
                step.write(layer, *_kept(storage, layer, sources, width, score, note))
        except BaseException:
            step.abandon()
            raise
        step.commit()
    except BaseException:
        for sequence in fresh:
            sequence.close()
        raise
    return fresh


def _kept(
    storage: PageStorage,
    layer: int,
    sources: list[Source],
    width: int,
    score: Score,
    note: Note | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what is kept of one layer, ``[rows, num_kv_heads, width, its width]``, short rows at the end."""
    pools = storage.keys[layer], storage.values[layer]
    kept = [pool.new_zeros((len(sources), pool.shape[1], width, pool.shape[3])) for pool in pools]
    for row, source in enumerate(sources):
        count = len(source.tokens)
        keys, values = (
            pool.new_empty((1, pool.shape[1], source.sequence.length, pool.shape[3])) for pool in pools
        )
        with storage.still:
            table = PageTable.of(source.sequence)
            storage.gather(layer, table, 0, source.sequence.length, (keys[0], values[0]))
        places = choose(score(layer, row, keys.float(), values.float()), count)
        if note is not None:
            note(layer, row, places)
        for target, states in zip(kept, (keys, values), strict=True):
            target[row : row + 1, :, width - count :] = gather(states, places)
    return kept[0], kept[1]
