"""``Ticket``: the caller's end of one request, on the event loop.

The lane's thread knows nothing of it: the driver carries news across.
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Any

import anyio

if TYPE_CHECKING:
    from kvhybrid.engine.running import Running
    from kvhybrid.engine.text import Piece

__all__ = ["Ticket"]


class Ticket:
    """What has come of a request so far. ``released`` is set once it holds no page any more."""

    def __init__(self, running: Running, started: float) -> None:
        self.running = running
        self.pieces: deque[Piece] = deque()
        self.finish_reason: str | None = None
        self.error: Exception | None = None
        self.released = anyio.Event()
        self._parts: list[Piece] = []
        self._news = anyio.Event()
        self._started = started
        self._finished = started

    @property
    def is_over(self) -> bool:
        """True once nothing more will come."""
        return self.finish_reason is not None or self.error is not None

    def put(self, piece: Piece, finish_reason: str | None) -> None:
        """Add a piece of the answer, maybe the last."""
        self._parts.append(piece)
        self.pieces.append(piece)
        if finish_reason is not None:
            self.finish_reason = finish_reason
            self._finished = time.perf_counter()
            self.released.set()
        self._news.set()

    def fail(self, error: Exception) -> None:
        """End the request with an exception, unless it has ended."""
        if not self.is_over:
            self.error = error
        self.released.set()
        self._news.set()

    def leave(self) -> None:
        """Say that the request was abandoned and holds no page any more."""
        self.released.set()
        self._news.set()

    async def wait(self) -> None:
        """Return when the request is over; raises what ended it."""
        await self.released.wait()
        if self.error is not None:
            raise self.error

    async def next(self) -> Piece | None:
        """Return the next piece, None behind the last or once abandoned; raises what ended it."""
        while not self.pieces:
            if self.error is not None:
                raise self.error
            if self.released.is_set():
                return None
            self._news = anyio.Event()
            await self._news.wait()
        return self.pieces.popleft()

    @property
    def time_to_first_token_ms(self) -> float:
        """From the call to the first token."""
        return (self.running.first_token_at - self._started) * 1e3

    @property
    def latency_ms(self) -> float:
        """From the call to the last token."""
        return (self._finished - self._started) * 1e3

    def answer(self) -> dict[str, Any]:
        """Return the finished request's answer, plain data."""
        running = self.running
        return {
            "text": "".join(self._parts),
            "token_ids": list(running.generated),
            "cached": running.cached_tokens > 0,
            "cached_tokens": running.cached_tokens,
            "prompt_tokens": running.num_prompt_tokens,
            "completion_tokens": len(running.generated),
            "session_id": running.request.session_id,
            "finish_reason": self.finish_reason,
            "time_to_first_token_ms": self.time_to_first_token_ms,
            "latency_ms": self.latency_ms,
        }
