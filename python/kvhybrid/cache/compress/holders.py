"""``Holders``: who holds compressed pages while nobody runs them, and what compression came to.

Compressed pages are nobody else's and cannot be evicted. But their text can be computed again, whole: so when
there is no room, the ones that rested longest let go.
"""

from __future__ import annotations

import functools
import threading
import weakref
from typing import Protocol


class Holder(Protocol):
    """A session at rest that holds compressed pages."""

    def let_go(self) -> bool:
        """Give the pages back and remember the tokens; False when there are none, or it is in use."""


class Holders:
    """Compressed sessions at rest, the one that rested longest first; held weakly."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._resting: dict[int, weakref.ref[Holder]] = {}
        self._counts = {
            "compressions": 0,
            "removed_tokens": 0,
            "removed_bytes": 0,
            "skipped_compressions": 0,
            "undone_compressions": 0,
        }

    def rest(self, holder: Holder) -> None:
        """Note that ``holder`` rests from now on."""
        key = id(holder)
        with self._lock:
            self._resting.pop(key, None)
            # No lock in the callback: it may come at any moment, in any thread, and a dictionary bears it.
            self._resting[key] = weakref.ref(holder, functools.partial(_drop, self._resting, key))

    def make_room(self) -> bool:
        """Have the one that rested longest let go; False when nobody could."""
        with self._lock:
            resting = list(self._resting.items())
        for key, reference in resting:
            holder = reference()
            if holder is None or not holder.let_go():
                continue
            with self._lock:
                self._resting.pop(key, None)
                self._counts["undone_compressions"] += 1
            return True
        return False

    def compressed(self, tokens: int, num_bytes: int) -> None:
        """Count a compression that removed ``tokens``, in pages ``num_bytes``, of all rows."""
        with self._lock:
            self._counts["compressions"] += 1
            self._counts["removed_tokens"] += tokens
            self._counts["removed_bytes"] += num_bytes

    def skipped(self) -> None:
        """Count a compression for which there was no room, or nothing to go by."""
        with self._lock:
            self._counts["skipped_compressions"] += 1

    def statistics(self) -> dict[str, int]:
        """Return the counters, since the cache was made."""
        return dict(self._counts)


def _drop(resting: dict[int, weakref.ref[Holder]], key: int, gone: weakref.ref[Holder]) -> None:
    if resting.get(key) is gone:  # and not another one at the same address
        del resting[key]
