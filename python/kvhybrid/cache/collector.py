"""``Collector``: evicts cold pages in the background, before somebody has to wait for room.

Knows the pool's counters alone. Which page is coldest is the pool's policy; the hard cap is the
pool's, too, and holds without a collector.
"""

from __future__ import annotations

import logging
import math
import threading
import weakref
from typing import TYPE_CHECKING, Final

import numpy as np

from kvhybrid.cache.demotion import demote, undone

if TYPE_CHECKING:
    from kvhybrid._core import PagePool
    from kvhybrid.cache.pages import PageStorage

# How far below the threshold a run goes, as a share of it: far enough that not every step starts one.
LOW_WATERMARK: Final = 0.8
# Pages evicted in one call: the pool is locked for so long, a few microseconds.
EVICT_AT_ONCE: Final = 32


class Collector:
    """Starts once ``threshold`` of the pages are in use, and stops at ``LOW_WATERMARK`` of that.

    Pages of full precision have marks of their own where others are quantized: cold ones are demoted.
    Pinned pages and those of running texts stay, so a run may end above its mark. The thread is a daemon,
    begins with the first need and ends with ``stop``, or when nobody holds the collector any more.
    """

    def __init__(self, pool: PagePool, threshold: float, storage: PageStorage | None = None) -> None:
        self._pool = pool
        self._storage = storage if storage is not None and storage.records else None
        num_full = pool.num_pages - pool.num_quantized
        self._high_full = max(math.ceil(num_full * threshold), 1)
        self._low_full = min(math.floor(num_full * threshold * LOW_WATERMARK), self._high_full - 1)
        self.high = max(math.ceil(pool.num_pages * threshold), 1)
        self.low = min(math.floor(pool.num_pages * threshold * LOW_WATERMARK), self.high - 1)
        self.runs = 0
        self.evicted_pages = 0
        self.failures = 0
        """Runs in which something raised: the codec on a device, mostly."""
        self._wake = threading.Event()
        self._starting = threading.RLock()  # a finalizer may look in the middle of a look
        self._thread: threading.Thread | None = None
        self._stopped = False

    def look(self) -> None:
        """Wake the thread if there is something to do. Two counters are read: for the request path."""
        if self._is_due():
            self._start()
            self._wake.set()

    def collect(self) -> int:
        """Demote and evict down to the low watermarks if a threshold is reached; return what was evicted.

        A codec that raises is counted in ``failures``, said once, and keeps nothing from being evicted.
        """
        if not self._is_due():
            return 0
        self.runs += 1
        if self._is_warm():
            try:
                self._demote()
            except Exception as error:  # noqa: BLE001  # of whatever library a device's codec runs on
                self._failed(error)
        if self._used() < self.high:
            return 0
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

    def _failed(self, error: Exception) -> None:
        """Count an exception; the first is logged, because every run may bring one more."""
        self.failures += 1
        if self.failures == 1:
            logging.getLogger(__name__).error(
                "background eviction failed and goes on; further failures are counted as gc_failures",
                exc_info=error,
            )

    def _used(self) -> int:
        return self._pool.num_pages - self._pool.num_free

    def _used_full(self) -> int:
        free = self._pool.num_free - self._pool.num_free_quantized
        return self._pool.num_pages - self._pool.num_quantized - free

    def _is_due(self) -> bool:
        return self._pool.num_evictable > 0 and (self._used() >= self.high or self._is_warm())

    def _is_warm(self) -> bool:
        """True when there are cold pages of full precision to demote, and they are many."""
        return (
            self._storage is not None
            and self._used_full() >= self._high_full
            and self._pool.num_free_quantized > 0
        )

    def _demote(self) -> None:
        """Demote down to the low watermark, a batch at a time, as long as there is something to demote."""
        assert self._storage is not None
        before = None
        while not self._stopped and (excess := self._used_full() - self._low_full) > 0 and excess != before:
            before = excess
            with self._storage.still, undone(self._pool.demote(min(excess, EVICT_AT_ONCE))) as plan:
                plan.fill(*(np.empty(shape, np.int32) for shape in ((0, 0), 0, (0, 2))))
                if demote(self._storage, plan):
                    plan.abandon()

    def _start(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            return
        with self._starting:
            # After a fork the thread is there by name only; one that was just made counts as alive.
            is_dead = self._thread is not None and self._thread.ident is not None
            if not self._stopped and (self._thread is None or (is_dead and not self._thread.is_alive())):
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
