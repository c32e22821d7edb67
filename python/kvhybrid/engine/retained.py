"""``RetainedConversation``: how long a conversation is wanted, said once and kept from turn to turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvhybrid.cache.retention import Retention
from kvhybrid.errors import UnsupportedError
from kvhybrid.model.session_retention import SessionRetention

if TYPE_CHECKING:
    from kvhybrid._core import TokenBuffer
    from kvhybrid.cache.kv_cache import KVCache
    from kvhybrid.model.rows import Text

__all__ = ["RetainedConversation"]


class RetainedConversation:
    """The part of an engine's session that speaks of the time between its turns."""

    id: str
    num_turns: int
    _tokens: TokenBuffer

    def __init__(self, cache: KVCache, *, is_compressed: bool) -> None:
        self._retention = SessionRetention(cache.pool)
        self._is_compressed = is_compressed

    def retain(self, *, priority: int = 0, ttl_s: float | None = None) -> None:
        """Have the conversation, now and after every turn, leave before or after others.

        As ``KVCache.retain`` does it, ``ttl_s`` counted from the end of the last turn. What was cached before
        its first turn asked for it is others', too, and never leaves earlier for it. A turn's own
        ``retention`` goes before this. Called without either, it is as any other. Raises
        ``InvalidRequestError``.
        """
        self._retention.retain(self._text(), Retention.of(priority, ttl_s))

    def pin(self) -> int:
        """Pin the conversation, now and after every turn: its pages neither leave nor step down.

        Returns how many tokens are pinned now. Until ``unpin`` or ``KVEngine.drop_session``. What a later
        turn adds is pinned only as far as users may pin so much (``max_pinned_share``). Raises
        ``CapacityError`` with the numbers beyond that, ``UnsupportedError`` with ``use_compression``.
        """
        if self._is_compressed:
            raise UnsupportedError(f"session {self.id!r}: what is compressed cannot be pinned, it is held")
        return self._retention.pin(self._text())

    def unpin(self) -> None:
        """Let its pages leave again. Nothing happens when it is not pinned."""
        self._retention.unpin()

    @property
    def is_pinned(self) -> bool:
        """True from ``pin`` on."""
        return self._retention.is_pinned

    def retire(self, tokens: TokenBuffer | None = None) -> None:
        """Say that nobody goes on with it: what is its own is the first to leave.

        ``tokens``: its text with what was computed behind it, by a turn that failed.
        """
        texts = self._text() if tokens is None else [_read(tokens)]
        self._retention.retire(texts, always=True)

    def _end_turn(self, namespace: int, found: int) -> None:
        """Retain what a turn in ``namespace`` added to a prompt that was cached up to ``found``."""
        self._retention.begin(namespace, self._text(), [found])
        self._retention.rest(self._text())

    def _text(self) -> list[Text]:
        return [_read(self._tokens)] if self.num_turns else []


def _read(tokens: TokenBuffer) -> Text:
    return np.frombuffer(tokens.tobytes(), np.uint32)
