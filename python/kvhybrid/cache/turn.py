"""``Turn``: a lock for which a finalizer or a signal handler never waits.

They run in the middle of whatever their thread does, and may close what that thread works on, or what another
thread works on that waits for this one. What they ask for is carried out at once, or when the holder is done.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Self

from kvhybrid.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Turn"]


class Turn:
    """One thread at a time, as a context manager. ``name``: whose turn it is, for errors."""

    def __init__(self, name: str) -> None:
        self._name = name
        # Re-entrant, so that whoever comes between taking it and noting so does not wait for itself.
        self._lock = threading.RLock()
        self._is_taken = False  # read and written by whoever has the lock
        self._later: deque[Callable[[], object]] = deque()

    def __enter__(self) -> Self:
        """Wait for other threads; raises ``InvalidRequestError`` within the turn of this thread."""
        self._lock.acquire()
        if self._is_taken:
            self._lock.release()
            raise InvalidRequestError(f"{self._name} is in the middle of a call of this thread")
        self._is_taken = True
        return self

    def __exit__(self, *exc_info: object) -> None:
        try:
            self._carry_out()
        finally:
            self._is_taken = False
            self._lock.release()
        self._settle()

    def soon(self, call: Callable[[], object]) -> None:
        """Have a call made while nobody has the turn: now, or when whoever has it is done. Never waits."""
        self._later.append(call)
        self._settle()

    def _settle(self) -> None:
        # Whoever has the turn looks again after letting go of it: nothing stays behind.
        while self._later and self._lock.acquire(blocking=False):
            if self._is_taken:
                self._lock.release()
                return
            self._is_taken = True
            try:
                self._carry_out()
            finally:
                self._is_taken = False
                self._lock.release()

    def _carry_out(self) -> None:
        while self._later:
            self._later.popleft()()
