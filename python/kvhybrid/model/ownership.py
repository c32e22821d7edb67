"""``Ownership``: one thread at a time, and an end that waits for whoever is at it."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kvhybrid.errors import ClosedError, InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from weakref import WeakMethod


class Ownership:
    """Who uses a session. ``end`` gives its pages back, once nobody uses it any more.

    Held weakly: in a circle with its session, one that nobody holds would keep its pages.
    """

    def __init__(self, name: str, end: WeakMethod[Callable[[], None]]) -> None:
        self._name = name
        self._end = end
        self._lock = threading.RLock()
        self._is_closing = self._has_ended = False
        self.depth = 0
        """How often the owner has entered ``in_use``: 2 inside a call of ``generate``."""

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Own the session for a while; re-entrant for its thread.

        Raises ``InvalidRequestError`` while another thread owns it: one text has one next token.
        """
        if not self._lock.acquire(blocking=False):
            raise InvalidRequestError(f"session {self._name!r} is in use by another thread")
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self._is_closing and self.depth == 0:
                self._close()
            self._lock.release()

    def try_alone(self, act: Callable[[], bool]) -> bool:
        """Act if nobody uses the session and return what came of it; waits for nobody."""
        if not self._lock.acquire(blocking=False):
            return False
        try:
            if self.depth or self._has_ended:
                return False
            return act()
        finally:
            self._lock.release()

    def close(self) -> None:
        """End now, or, while another thread owns the session, as soon as it is done. Idempotent."""
        self._is_closing = True
        if self._lock.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._lock.release()

    def _close(self) -> None:
        if (end := self._end()) is not None:
            end()
        self._has_ended = True

    def check_open(self) -> None:
        """Raise ``ClosedError`` once the session has ended."""
        if self._has_ended:
            raise ClosedError(f"session {self._name!r} is closed")
