"""``Scheduler``: who waits, and in which order they come in.

Priority first, then the nearer deadline, then arrival. Bounded: what does not fit is refused at the
door. Used by the event loop alone; knows nothing of pages.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from kvhybrid.errors import OverloadedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvhybrid.engine.running import Rank, Running

__all__ = ["Scheduler"]


class Scheduler:
    """A bounded queue by rank. ``places`` counts those that are still at the door, too."""

    def __init__(self, max_queued: int) -> None:
        self.max_queued = max_queued
        self._heap: list[tuple[Rank, Running]] = []
        self._queued: dict[int, Running] = {}
        self._at_door = 0

    def __len__(self) -> int:
        return len(self._queued)

    @property
    def places_taken(self) -> int:
        """Requests that wait, at the door or in the queue."""
        return self._at_door + len(self._queued)

    def reserve(self, retry_after: float) -> None:
        """Take a place in the queue for a request that is being read; ``admit`` or ``leave_door`` follows.

        Raises ``OverloadedError`` when there is none.
        """
        if self.places_taken >= self.max_queued:
            raise OverloadedError(
                f"{self.places_taken} of {self.max_queued} places in the queue are taken: "
                f"try again in {retry_after:.1f} s",
                retry_after,
            )
        self._at_door += 1

    def leave_door(self) -> None:
        """Give back the place of a request that was refused, or that takes it up in the queue."""
        self._at_door -= 1

    def push(self, rows: Iterable[Running]) -> None:
        """Queue rows; the bound is not theirs, they had a place before."""
        for row in rows:
            self._queued[row.key] = row
            heapq.heappush(self._heap, (row.rank, row))

    def pop(self, count: int) -> list[Running]:
        """Take out up to ``count`` rows, the first in rank first."""
        rows: list[Running] = []
        while self._heap and len(rows) < count:
            row = heapq.heappop(self._heap)[1]
            if self._queued.pop(row.key, None) is not None:
                rows.append(row)
        return rows

    def discard(self, row: Running) -> bool:
        """Take a row out, wherever it stands; False when it is not queued."""
        if self._queued.pop(row.key, None) is None:
            return False
        # Its entry stays in the heap until it comes up, or until such entries are the larger part.
        if len(self._heap) > 2 * len(self._queued) + 8:
            self._heap = [entry for entry in self._heap if entry[1].key in self._queued]
            heapq.heapify(self._heap)
        return True
