"""``Hints``: what somebody waits to go on from, kept from leaving as long as nobody needs the room.

Bounded, and given up before anything that runs has to make room: a hint costs speed at worst.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvhybrid._core import PagePool, Pin, TokenBuffer

__all__ = ["Hints"]

# Of the pages, those that hints may keep from leaving. More would push out what others come back to.
PARTS: Final = 4


class Hints:
    """What waiting requests will need, by number. ``make_room`` asks ``otherwise`` when no hint is left."""

    def __init__(self, pool: PagePool, otherwise: Callable[[], bool]) -> None:
        self._pool = pool
        self._otherwise = otherwise
        self._most_pages = pool.num_pages // PARTS
        self._lock = threading.RLock()
        self._pins: dict[int, Pin] = {}
        self._given_up = 0

    def hold(self, key: int, tokens: TokenBuffer, namespace: int) -> None:
        """Keep what is cached of a text from leaving, if there is still room for hints."""
        pin = self._pool.hint(tokens, namespace, most_pages=self._most_pages)
        if pin is not None:
            with self._lock:
                self._pins[key] = pin

    def drop(self, key: int) -> None:
        """Let go: whoever waited has begun, or left. Nothing happens when nothing is held."""
        with self._lock:
            pin = self._pins.pop(key, None)
        if pin is not None:
            pin.release()

    def make_room(self) -> bool:
        """Give up the hint that came last, or whatever else can be; False when there is nothing."""
        with self._lock:
            pin = self._pins.popitem()[1] if self._pins else None
            self._given_up += pin is not None
        if pin is None:
            return self._otherwise()
        pin.release()
        return True

    def statistics(self) -> dict[str, int]:
        """Return how many requests wait with a hint, and how many hints were given up for room."""
        return {"hinted_requests": len(self._pins), "hints_given_up": self._given_up}
