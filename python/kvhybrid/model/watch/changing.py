"""``Changing``: what the model itself writes into its modules while it runs."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvhybrid.model.watch.module_scan import ModuleScan

__all__ = ["WHOLE", "Changing"]

WHOLE: Final = "all of it"
"""The key that stands for everything in a container."""
# In how many of the passes that are watched a thing must change: once may be somebody else's doing.
_LEAST: Final = 2
_NONE: Final = object()


class Changing:
    """Places that the model's own forward pass writes: they describe the last pass, and name nothing."""

    def __init__(self) -> None:
        self._keys: dict[int, set[object]] = {}
        self._held: list[object] = []
        self._seen: Counter[tuple[int, object]] = Counter()

    def __contains__(self, place: tuple[object, object]) -> bool:
        keys = self._keys.get(id(place[0]))
        return keys is not None and (place[1] in keys or WHOLE in keys)

    def start(self) -> None:
        """Begin to count anew in how many passes each place changes."""
        self._seen.clear()

    def add(self, container: object, key: object) -> None:
        """Leave an item out from now on. ``container`` is kept alive: its address names it."""
        if id(container) not in self._keys:
            self._keys[id(container)] = set()
            self._held.append(container)
        self._keys[id(container)].add(key)

    def learn(self, before: ModuleScan, after: ModuleScan) -> bool:
        """Note what differs between two scans with one forward pass between them.

        Returns whether something was learned and nothing differs beside it.
        """
        places = [*_containers(before, after), *_entries(before, after)]
        for place, key in places:
            self._seen[id(place), key] += 1
            if self._seen[id(place), key] >= _LEAST:
                self.add(place, key)
        return bool(places) and all(place in self for place in places)


def _containers(before: ModuleScan, after: ModuleScan) -> Iterable[tuple[object, object]]:
    earlier = dict(zip(map(id, before.containers), before.items, strict=True))
    for container, items in zip(after.containers, after.items, strict=True):
        known = earlier.get(id(container))
        if known is None or after.registers(container):
            continue
        if not after.has_names(container) and known.keys() != items.keys():
            yield container, WHOLE  # it grows, or is emptied: not one item of it stays
            continue
        changed = [key for key in {*known, *items} if known.get(key, _NONE) is not items.get(key, _NONE)]
        yield from ((container, key if isinstance(container, dict) else WHOLE) for key in changed)


def _entries(before: ModuleScan, after: ModuleScan) -> Iterable[tuple[object, object]]:
    known = {(id(place), key): value for place, key, value in before.found()}
    for place, key, value in after.found():
        if known.get((id(place), key), value) is not value:
            yield place, key
