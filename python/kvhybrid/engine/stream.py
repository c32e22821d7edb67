"""``Stream``: an answer piece by piece, as it is made."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Self

import anyio
import anyio.lowlevel

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from kvhybrid.engine.text import Piece
    from kvhybrid.engine.ticket import Ticket

__all__ = ["Stream"]


class Stream:
    """An async iterator over the ``Piece`` of every token; joined they are the answer's text.

    The request is queued when the first piece is asked for. Leaving early stops the work: at once and
    with its pages free when left through ``async with`` or ``aclose``; after the step in flight when the
    stream is merely dropped, or when whoever waits for a piece is cancelled. Pieces that nobody fetches
    wait here, a request's ``max_length`` at most.
    """

    _ticket: Ticket | None = None
    _is_over = True

    def __init__(
        self,
        submit: Callable[[], Awaitable[Ticket]],
        abandon: Callable[[Ticket], Awaitable[None]],
        *,
        deadline: float | None = None,
        on_end: Callable[[Ticket | None], None] | None = None,
    ) -> None:
        self._submit = submit
        self._abandon = abandon
        self._deadline = deadline
        self._expires = math.nan
        self._on_end = on_end
        self._is_over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        """Return the next piece; raises what ended the request, ``TimeoutError`` past its deadline."""
        if self._is_over:
            raise StopAsyncIteration
        try:
            piece = await self._next()
        except BaseException:
            await self.aclose()
            raise
        if piece is None:
            await self.aclose()
            raise StopAsyncIteration
        return piece

    async def _next(self) -> Piece | None:
        if math.isnan(self._expires):
            self._expires = anyio.current_time() + self._deadline if self._deadline else math.inf
        # What was finished in time may be read at leisure.
        finished = self._ticket is not None and self._ticket.is_over
        with anyio.CancelScope(deadline=math.inf if finished else self._expires) as scope:
            if self._ticket is None:
                self._ticket = await self._submit()
            else:
                await anyio.lowlevel.checkpoint()
            piece = await self._ticket.next()
            if piece is not None and self._ticket.finish_reason and not self._ticket.pieces:
                self._end(self._ticket)
            return None if self._is_over and piece is None else piece
        assert scope.cancelled_caught
        raise TimeoutError(f"the deadline of {self._deadline} s passed")

    async def aclose(self) -> None:
        """Stop the work and return when its pages are free. Idempotent."""
        if self._ticket is not None and not self._ticket.is_over:
            await self._abandon(self._ticket)
        self._end(None)

    def _end(self, ticket: Ticket | None) -> None:
        if not self._is_over:
            self._is_over = True
            if self._on_end is not None:
                self._on_end(ticket)

    def answer(self) -> dict[str, Any] | None:
        """Return what ``process_request`` would have returned, once the last piece is fetched."""
        if self._ticket is None or self._ticket.finish_reason is None or self._ticket.pieces:
            return None
        return self._ticket.answer()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        # Nothing but a flag, because this may run in any thread: the lane looks at it every step.
        if self._ticket is not None:
            self._ticket.running.cancelled = True
        self._end(None)
