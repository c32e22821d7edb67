"""``RetainedSession``: how users say how long they want a session that ``transformers`` sees as a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvhybrid.cache.retention import Retention
from kvhybrid.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from kvhybrid.model.compression import Compression
    from kvhybrid.model.session_rows import SessionRows

__all__ = ["RetainedSession"]


class RetainedSession:
    """The part of a session that users say how long they want it."""

    rows: SessionRows
    _compression: Compression
    _open: Callable[[], AbstractContextManager[None]]

    def retain(self, *, priority: int = 0, ttl_s: float | None = None) -> None:
        """Have the session's text, now and after every call, leave before or after others.

        As ``KVCache.retain`` does it, ``ttl_s`` counted from the last use. What was cached before the
        session's first prompt asked for it is others', too, and never leaves earlier for it. Called without
        either, the text is as any other. Ends with ``KVCache.drop_session``: then it is the first to leave.
        Forks are retained likewise.

        Raises ``InvalidRequestError`` for what is out of range, ``UnsupportedError`` when the session's
        context is compressed: its pages are its own, and held.
        """
        retention = Retention.of(priority, ttl_s)
        with self._open():
            self._check_shared("retained")
            texts = self.rows.text().texts
            self.rows.retention.retain(texts, retention)

    def pin(self) -> int:
        """Pin the session's text, now and after every call: its pages neither leave nor step down.

        Returns how many tokens are pinned now: what was evicted before is as soon as it was computed again.
        Until ``unpin``, ``KVCache.drop_session`` or the end of the session; forks are not pinned. What a
        later call adds is pinned only as far as users may pin so much (``max_pinned_share``). Raises
        ``CapacityError`` with the numbers beyond that, and ``UnsupportedError`` when the context is
        compressed.
        """
        with self._open():
            self._check_shared("pinned")
            return self.rows.retention.pin(self.rows.text().texts)

    def unpin(self) -> None:
        """Let its pages leave again. Nothing happens when it is not pinned."""
        with self._open():
            self.rows.retention.unpin()

    @property
    def is_pinned(self) -> bool:
        """True from ``pin`` on."""
        return self.rows.retention.is_pinned

    def _check_shared(self, what: str) -> None:
        if self._compression.kept < 1.0 or (self.rows.rows is not None and self.rows.rows.is_compressed):
            raise UnsupportedError(
                f"a session whose context is compressed cannot be {what}: it holds its pages"
            )
