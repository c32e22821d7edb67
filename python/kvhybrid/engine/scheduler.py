"""``Scheduler``: who waits, in which order they come in, and who finds no place.

Priority first, then the nearer deadline, then arrival, but nobody waits for ever: a request ages, and is
overtaken only by those that came soon after it (``rank_of``). Bounded: what does not fit is refused at the
door, or displaces a request of lower priority, or of a tenant that fills the queue. Used by the event loop
alone; knows nothing of pages.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from kvhybrid.errors import OverloadedError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvhybrid.engine.running import Rank, Running

__all__ = ["PRIORITY_S", "UNHURRIED_S", "Place", "Scheduler", "rank_of"]

PRIORITY_S: Final = 10.0
"""By so many seconds of arrival one more of priority is better."""
UNHURRIED_S: Final = 8.0
"""What a deadline is worth in seconds of arrival, at most: that of a request that has none."""


def rank_of(arrived: float, deadline: float, priority: int) -> float:
    """Return when a request's turn is due: the smaller, the earlier. Times in seconds of one clock.

    ``deadline``: seconds after ``arrived``, ``math.inf`` for none. A request is never overtaken by one that
    arrives more than ``PRIORITY_S`` times the difference of their priorities plus ``UNHURRIED_S`` later.
    """
    hurry = UNHURRIED_S if math.isinf(deadline) else UNHURRIED_S * deadline / (deadline + UNHURRIED_S)
    return arrived + hurry - PRIORITY_S * priority


@dataclass(eq=False, slots=True)
class Place:
    """A place in the queue, taken by a request whose prompt is being read."""

    tenant: str
    priority: int
    is_lost: bool = False
    """True once another request was given it."""


class Scheduler:
    """A bounded queue by rank. ``places`` counts those that are still at the door, too."""

    def __init__(self, max_queued: int) -> None:
        self.max_queued = max_queued
        self._heap: list[tuple[Rank, Running]] = []
        self._queued: dict[int, Running] = {}
        self._door: dict[Place, None] = {}  # in order of arrival
        self._places: Counter[str] = Counter()  # by tenant

    def __len__(self) -> int:
        return len(self._queued)

    @property
    def places_taken(self) -> int:
        """Requests that wait, at the door or in the queue."""
        return len(self._door) + len(self._queued)

    def reserve(self, tenant: str, priority: int, retry_after: float) -> tuple[Place, Running | None]:
        """Take a place in the queue for a request that is being read; ``leave_door`` follows.

        Returns it, and the queued request that gives up its place for it, if one must: the last of those of
        the lowest priority below its own; or the last of a tenant that has more places than this one would
        have, and whose priority is no higher. One that is still read loses it, too, and is told afterwards.
        Raises ``OverloadedError`` when there is none.
        """
        displaced = None
        if self.places_taken >= self.max_queued:
            found = self._to_displace(tenant, priority)
            if found is None:
                raise self.overloaded(retry_after)
            if isinstance(found, Place):
                found.is_lost = True
                self.leave_door(found)
            else:
                self.discard(found)
                displaced = found
        place = Place(tenant, priority)
        self._door[place] = None
        self._places[tenant] += 1
        return place, displaced

    def overloaded(self, retry_after: float) -> OverloadedError:
        """Return the error of a request that finds no place, or loses it."""
        return OverloadedError(
            f"{self.places_taken} of {self.max_queued} places in the queue are taken: "
            f"try again in {retry_after:.1f} s",
            retry_after,
        )

    def _to_displace(self, tenant: str, priority: int) -> Place | Running | None:
        """Return who gives its place to a newcomer. Looks at every place: only a full queue asks."""
        # Who is still read came last, and has cost the least.
        waiting: list[tuple[int, str, Rank, Place | Running]] = [
            (place.priority, place.tenant, (math.inf, number), place)
            for number, place in enumerate(self._door)
        ]
        waiting += [(r.request.priority, r.request.tenant, r.rank, r) for r in self._queued.values()]
        lowest = min((each[0] for each in waiting), default=math.inf)
        if lowest < priority:
            return max((each for each in waiting if each[0] == lowest), key=lambda each: each[2])[3]
        mine = self._places[tenant] + 1
        greedy = [each for each in waiting if each[0] <= priority and self._places[each[1]] > mine]
        return max(greedy, key=lambda each: (self._places[each[1]], each[2]), default=(None,))[-1]

    def leave_door(self, place: Place) -> None:
        """Give back the place of a request that was refused, or that takes it up in the queue. Idempotent."""
        if place in self._door:
            del self._door[place]
            self._give_place_back(place.tenant)

    def push(self, rows: Iterable[Running]) -> None:
        """Queue rows; the bound is not theirs, they had a place before."""
        for row in rows:
            self._queued[row.key] = row
            self._places[row.request.tenant] += 1
            heapq.heappush(self._heap, (row.rank, row))

    def pop(self, count: int) -> list[Running]:
        """Take out up to ``count`` rows, the first in rank first."""
        rows: list[Running] = []
        while self._heap and len(rows) < count:
            row = heapq.heappop(self._heap)[1]
            if self._queued.pop(row.key, None) is not None:
                self._give_place_back(row.request.tenant)
                rows.append(row)
        return rows

    def discard(self, row: Running) -> bool:
        """Take a row out, wherever it stands; False when it is not queued."""
        if self._queued.pop(row.key, None) is None:
            return False
        self._give_place_back(row.request.tenant)
        # Its entry stays in the heap until it comes up, or until such entries are the larger part.
        if len(self._heap) > 2 * len(self._queued) + 8:
            self._heap = [entry for entry in self._heap if entry[1].key in self._queued]
            heapq.heapify(self._heap)
        return True

    def _give_place_back(self, tenant: str) -> None:
        self._places[tenant] -= 1
        if self._places[tenant] <= 0:
            del self._places[tenant]
