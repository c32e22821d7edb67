"""``Collector``: evicts cold pages in the background, before somebody has to wait for room.

Knows the pool's counters alone. Which page is coldest is the pool's policy; the hard cap is the
pool's, too, and holds without a collector.
"""

from __future__ import annotations

import math
import threading
import weakref
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvhybrid._core import PagePool

# How far below the threshold a run goes, as a share of it: far enough that not every step starts one.
LOW_WATERMARK: Final = 0.8
# Pages evicted in one call: the pool is locked for so long, a few microseconds.
EVICT_AT_ONCE: Final = 32


class Collector:
    """Starts once ``threshold`` of the pages are in use, and stops at ``LOW_WATERMARK`` of that.

    Pinned pages and those of running texts stay, so a run may end above its mark. The thread is a daemon,
    begins with the first need and ends with ``stop``, or when nobody holds the collector any more.
    """

    def __init__(self, pool: PagePool, threshold: float) -> None:
        self._pool = pool
        self.high = max(math.ceil(pool.num_pages * threshold), 1)
        self.low = min(math.floor(pool.num_pages * threshold * LOW_WATERMARK), self.high - 1)
        self.runs = 0
        self.evicted_pages = 0
        self._wake = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def look(self) -> None:
        """Wake the thread if there is something to do. Two counters are read: for the request path."""
        if self._is_due():
            self._start()
            self._wake.set()

    def collect(self) -> int:
        """Evict down to the low watermark if the threshold is reached; return how many pages left."""
        if not self._is_due():
            return 0
        self.runs += 1
        total = 0
        while not self._stopped and (excess := self._used() - self.low) > 0:
            evicted = self._pool.evict(min(excess, EVICT_AT_ONCE))
            if evicted == 0:
                break
            total += evicted
            self.evicted_pages += evicted
        return total

    def stop(self) -> None:
        """End the thread, after the batch under way. Idempotent, and final."""
        with self._starting:
            self._stopped = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _used(self) -> int:
        return self._pool.num_pages - self._pool.num_free

    def _is_due(self) -> bool:
        return self._used() >= self.high and self._pool.num_evictable > 0

    def _start(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        with self._starting:
            # After a fork the thread is there by name only.
            if not self._stopped and (self._thread is None or not self._thread.is_alive()):
                # An event of its own: after a fork the old one's lock may be held by nobody.
                wake = self._wake = threading.Event()
                # Without this it would wait for ever behind a collector that is gone.
                weakref.finalize(self, wake.set).atexit = False
                self._thread = threading.Thread(
                    target=_run, args=(weakref.ref(self), wake), name="kvhybrid-collector", daemon=True
                )
                self._thread.start()


def _run(collector: weakref.ref[Collector], wake: threading.Event) -> None:
    """Collect whenever woken. Holds the collector only while it works."""
    while True:
        wake.wait()
        wake.clear()
        found = collector()
        if found is None or found._stopped:  # noqa: SLF001  # its own thread
            return
        found.collect()
        del found
