"""When a session's states are kept, and where it can go on from: at the ends of blocks.

K and V can be reused to the token, a state only where it was taken. So a prompt's forward pass is cut
where a state is worth keeping: at the last block's end before the prompt's, where texts were seen to
part, and every ``STRIDE`` tokens. What lies behind the last state is computed again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

if TYPE_CHECKING:
    import numpy.typing as npt

    from kvhybrid._core import Sequence
    from kvhybrid.cache.states import PageStates
    from kvhybrid.model.layer_states import LayerStates

    Opened: TypeAlias = list[tuple[int, Sequence]]
    """Each row's padding and its sequence."""
    BlockTable: TypeAlias = npt.NDArray[np.int32]

# Tokens from one state to the next within a long prompt: texts that part in between compute no more than
# these again.
STRIDE = 512


class SessionStates:
    """The live states of one session (``live``) and its dealings with those behind pages (``store``)."""

    def __init__(self, live: LayerStates, store: PageStates, block_size: int) -> None:
        self.live = live
        self._store = store
        self._size = block_size
        self._stride = max(STRIDE // block_size, 1) * block_size
        self._parted = 0  # the column up to which all rows were cached when they were opened
        self._latest: dict[int, int] = {}  # row -> page of the last state kept while decoding

    def resume(self, rows: Opened, stop: int, grid: int) -> int:
        """Go on from the last column that every row can go on from, and return it; 0 to begin anew.

        ``rows`` were just opened: what they hold is cached, up to column ``stop`` in all of them, and
        pinned. The column is a multiple of ``grid``.
        """
        with self._store.still:
            return self._resume(rows, stop, grid)

    def _resume(self, rows: Opened, stop: int, grid: int) -> int:
        self._latest = {}
        self._parted = stop
        tables = [_block_table(row) for _, row in rows]
        pad = rows[0][0]
        for column in range(stop - (stop - pad) % self._size, pad, -self._size):
            pages = [
                self._page(column - its_pad, table) for (its_pad, _), table in zip(rows, tables, strict=True)
            ]
            if column % grid or not all(page in self._store for page in pages):
                continue
            states = [self._store.get(page) for page in pages]
            found = [state for state in states if state is not None]
            if len(found) == len(rows):  # else another session had one leave in between
                self.live.restore(found)
                return column
        self.live.reset()
        return 0

    def _page(self, length: int, table: BlockTable) -> int:
        """Return the page that ends behind ``length`` tokens; -1 where no block ends."""
        blocks, rest = divmod(length, self._size)
        return -1 if rest or blocks <= 0 else int(table[blocks - 1])

    def cuts(self, pad: int, start: int, stop: int, *, is_last: bool) -> list[int]:
        """Return the columns between ``start`` and ``stop`` at which to end a forward pass, in order.

        ``pad``: padding of the longest text, whose blocks count: others' end there by chance only.
        ``is_last``: the prompt ends at ``stop``.
        """
        chosen = {pad + (self._parted - pad) // self._size * self._size}
        chosen.update(range(pad + self._stride, stop, self._stride))
        if is_last:
            chosen.add(pad + (stop - pad - 1) // self._size * self._size)
        return sorted(column for column in chosen if max(start, pad) < column < stop)

    def keep(self, rows: Opened, width: int) -> None:
        """Keep the states of rows that ended at a block's end in a committed pass of ``width`` columns."""
        with self._store.still:
            self._keep(rows, width)

    def _keep(self, rows: Opened, width: int) -> None:
        for index, (_, row) in enumerate(rows):
            if row.length == 0 or row.length % self._size:
                continue
            page = self._page(row.length, _block_table(row))
            if self._store.touch(page):
                continue
            try:
                state = self.live.take(index)
            except torch.OutOfMemoryError:  # the text is computed: a state not kept costs speed alone
                self._store.clear()
                return
            self._store.put(page, state)
            if width == 1 and row.length % self._stride:
                # While decoding the next turn goes on from the last one: no need to keep those before.
                if index in self._latest:
                    self._store.drop([self._latest[index]])
                self._latest[index] = page

    def copy_to(self, other: SessionStates, num_rows: int) -> None:
        """Give ``other`` a copy of the live states."""
        other.live.restore([self.live.take(row) for row in range(num_rows)])

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        self.live.select(rows)
        self._latest = {}

    def reset(self) -> None:
        """Begin anew."""
        self.live.reset()
        self._latest, self._parted = {}, 0


def _block_table(row: Sequence) -> BlockTable:
    return np.frombuffer(row.block_table(), np.int32)
