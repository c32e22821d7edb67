"""``Changing``: what the model itself writes into its modules while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvhybrid.model.watch.module_scan import ModuleScan

__all__ = ["Changing"]

_NONE: Final = object()


class Changing:
    """Plain attributes that the model's own forward pass writes: they describe the last pass."""

    def __init__(self) -> None:
        self._keys: dict[int, set[object]] = {}
        self._held: list[object] = []

    def __contains__(self, place: tuple[object, object]) -> bool:
        keys = self._keys.get(id(place[0]))
        return keys is not None and place[1] in keys

    def add(self, container: object, key: object) -> None:
        """Leave an item out from now on. ``container`` is kept alive: its address names it."""
        if id(container) not in self._keys:
            self._keys[id(container)] = set()
            self._held.append(container)
        self._keys[id(container)].add(key)

    def learn(self, before: ModuleScan, after: ModuleScan) -> None:
        """Add what differs between two scans with one forward pass between them."""
        earlier = dict(zip(map(id, before.containers), before.items, strict=True))
        for container, items in zip(after.containers, after.items, strict=True):
            known = earlier.get(id(container))
            if known is None or not isinstance(container, dict) or after.registers(container):
                continue
            for key in {*known, *items}:
                if known.get(key, _NONE) is not items.get(key, _NONE):
                    self.add(container, key)
