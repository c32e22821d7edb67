"""``TensorSession``: one session of K and V that came as tensors, without tokens.

Knows pages and how far each layer has come. Refuses to know who asks and what happens when there is no
room: that is ``kvhybrid.cache.process_kv``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kvhybrid._core import Batch
from kvhybrid.cache.compress.tensors import NOTHING_REMOVED, shorten
from kvhybrid.cache.demotion import demote, undone
from kvhybrid.cache.page_table import PageTable
from kvhybrid.cache.step import plan_with_room
from kvhybrid.cache.turn import Turn

if TYPE_CHECKING:
    from kvhybrid._core import PagePool, Plan, Sequence
    from kvhybrid.cache.pages import PageStorage
    from kvhybrid.presets import CompressionScorer


class TensorSession:
    """``batch`` rows of equal length, each a private sequence of the pool.

    The pool counts tokens and there are none here: the sequences hold placeholders and are never sealed,
    so that nobody finds their pages and no policy takes them. Whichever layer first brings new positions
    reserves their pages; the other layers write into the same slots. Behind a compressed ``front`` positions
    are as before, and lie by so many slots further to the front. Every call has its ``turn``.
    """

    def __init__(self, pool: PagePool, storage: PageStorage, batch: int) -> None:
        self.turn = Turn("the session")
        self.is_closed = False
        self.length = 0
        """Positions that have pages: those of the layer that has come furthest."""
        self.evicted = 0
        """Pages that left to make room for this session, since it began."""
        self.front = NOTHING_REMOVED
        self._storage = storage
        self._pool = pool
        nothing = np.empty(0, np.uint32)
        self._rows = [pool.open(nothing, reuse=False, share=False) for _ in range(batch)]
        self._batch = Batch(pool, self._rows)
        self._tables: dict[int, tuple[bytes, PageTable]] = {}
        self._frozen = 0  # positions that are filled in every layer
        self._filled = [0] * storage.layout.num_layers

    @property
    def num_rows(self) -> int:
        """Rows of the batch, fixed by the session's first slice."""
        return len(self._rows)

    def filled(self, layer: int) -> int:
        """Return how many positions of a layer are there."""
        return self._filled[layer]

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store K and V ``[batch, num_kv_heads, tokens, width]`` behind what the layer has.

        They count once ``advance`` says so. Raises ``CapacityError`` without room. After a failure
        ``truncate`` to the ``length`` before undoes what was begun.
        """
        past = self._filled[layer]
        end = past + key.shape[2]
        if end > self.length:
            self._reserve(end - self.length)
        # Only what is filled in every layer is frozen: nothing moves that is written here.
        for row, sequence in enumerate(self._rows):
            slot = past - self.front.removed
            self._storage.write_run(layer, self._table(row, sequence), slot, key[row], value[row])

    def read(self, layer: int, end: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies of a layer's positions ``[0, end)``, ``[batch, num_kv_heads, end, width]``.

        Of a compressed session, what is left of them; ``end`` lies behind its front.
        """
        storage, width = self._storage, end - self.front.removed
        pools = storage.keys[layer], storage.values[layer]
        keys, values = (
            torch.empty((self.num_rows, pool.shape[1], width, pool.shape[3]), dtype=dtype, device=pool.device)
            for pool in pools
        )
        with storage.still:
            for row, sequence in enumerate(self._rows):
                storage.gather(layer, self._table(row, sequence), 0, width, (keys[row], values[row]))
        return keys, values

    def advance(self, layer: int, end: int) -> None:
        """Make what was stored of a layer, up to ``end``, true."""
        self._filled[layer] = max(self._filled[layer], end)
        if not self._storage.records:
            return
        frozen = min(self._filled[layer] for layer in self._storage.layout.kept_layers)
        if frozen > self._frozen:
            self._frozen = frozen
            for row in self._rows:
                row.freeze(frozen - self.front.removed)

    def compress(self, rule: tuple[float, CompressionScorer]) -> int:
        """Keep a share of what is old, in fresh pages; return how many positions of all rows went.

        Nothing while some layer has still to come where the others are, or while less than a page would go.
        Raises ``CapacityError`` without room for both; nothing has changed then.
        """
        if any(self._filled[layer] != self.length for layer in self._storage.layout.kept_layers):
            return 0
        short = shorten(self._storage, self._pool, self._rows, self.front, self.length, rule)
        if short is None:
            return 0
        for row in self._rows:
            row.close()
        before = self.front.removed
        self._rows, self.front = short
        self._batch = Batch(self._pool, self._rows)
        self._tables.clear()
        self._storage.settled()
        return (self.front.removed - before) * self.num_rows

    def truncate(self, length: int) -> None:
        """Drop every position from ``length`` on, in every layer, and give back pages that are then empty.

        ``length`` is 0 or lies behind a compressed front.
        """
        if length == 0:
            self.front = NOTHING_REMOVED
        for row in self._rows:
            row.truncate(length - self.front.removed)
        self.length = length
        self._filled = [min(filled, length) for filled in self._filled]
        self._frozen = min(self._frozen, length)
        self._tables.clear()
        self._storage.settled()

    def close(self) -> None:
        """Give every page back. Idempotent."""
        self.is_closed = True
        for row in self._rows:
            row.close()
        self._storage.settled()

    def _reserve(self, count: int) -> None:
        """Give ``count`` more positions their pages in every row."""
        placeholders = np.zeros(count, np.uint32)
        for row in self._rows:
            row.append(placeholders)
        with self._storage.still:
            plan = self._planned()
        self.length += count
        self.evicted += plan.num_evicted
        self._storage.settled()

    def _planned(self) -> Plan:
        """Plan what was appended, copy what it goes on from, and commit."""
        while True:
            with undone(plan_with_room(self._storage, self._batch)) as plan:
                tables = np.empty((self.num_rows, plan.max_pages), np.int32)
                lengths = np.empty((self.num_rows, 2), np.int32)
                plan.fill(tables, np.empty(plan.num_tokens, np.int32), lengths)
                if demote(self._storage, plan):
                    self._storage.copy_pages(plan.copies)
                    # At once: private pages with nothing in them harm nobody, and are taken back by length.
                    plan.commit(written=False)
                    return plan

    def _table(self, row: int, sequence: Sequence) -> PageTable:
        """Return a row's pages as they are now; while they are the same it remembers its pieces."""
        ids = sequence.block_table()
        known = self._tables.get(row)
        if known is None or known[0] != ids:
            known = self._tables[row] = ids, PageTable.of(sequence)
        return known[1]
