"""``PassedBy``: calls that ran without the cache, by reason: counted, and said once."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvhybrid.cache.kv_cache import KVCache

__all__ = ["PassedBy"]

# Whose frames a warning does not point at.
_LIBRARIES: Final = ("contextlib", "kvhybrid", "torch", "transformers")


class PassedBy:
    """What becomes of the calls of one attachment: which the cache served, and which passed it by."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._said: set[str] = set()
        self._thread = threading.local()
        self.served = 0
        """Calls of ``generate`` that ran through the cache."""
        self.reasons: Counter[str] = Counter()
        """Calls that did not, by reason."""

    def note(self, reason: str, *, details: str = "", is_said: bool = True) -> None:
        """Count a call that runs without the cache, and warn of the first one of its kind.

        Calls that transformers makes within such a call (early exit drafts with the model itself) are not
        counted.
        """
        if getattr(self._thread, "passes", False):
            return
        self.reasons[reason] += 1
        self._cache.passed_by[reason] += 1
        if is_said and reason not in self._said:
            self._said.add(reason)
            message = f"generate runs without the cache: {reason}{details}"
            warnings.warn(message, stacklevel=_frames_of_libraries())

    def note_forward(self) -> None:
        """Count a forward pass over a prompt that came without a session, and not from ``generate``."""
        if not getattr(self._thread, "serves", False):
            self.note("forward was called without a session", is_said=False)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """Run a call without the cache inside."""
        before = getattr(self._thread, "passes", False)
        self._thread.passes = True
        try:
            yield
        finally:
            self._thread.passes = before

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Run a call of ``generate`` through the cache inside."""
        before, passed = getattr(self._thread, "serves", False), sum(self.reasons.values())
        self._thread.serves = True
        try:
            yield
        finally:
            self._thread.serves = before
        self.served += sum(self.reasons.values()) == passed

    def __str__(self) -> str:
        """Say what became of the calls."""
        passed = sum(self.reasons.values())
        if not passed:
            return f"{self.served} calls served" if self.served else "no call yet"
        most = ", ".join(f"{count} for {reason}" for reason, count in self.reasons.most_common(3))
        if not self.served:
            return f"every call passed by ({most})"
        return f"{self.served} calls served, {passed} passed by ({most})"


def _frames_of_libraries() -> int:
    """Return the stack level, from the caller on, of the first frame that is not a library's."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".", 1)[0] in _LIBRARIES:
        frame, level = frame.f_back, level + 1
    return level
