"""``Readers``: prompts become tokens in worker threads, and a long text holds up no short one.

A caller whose deadline passes, or who is cancelled, leaves at once. What its thread comes to is dropped, and
the thread's place is taken until then, so that such threads are never more than there are places.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.to_thread

from kvhybrid.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvhybrid.engine.door import Prompt
    from kvhybrid.engine.request import Request

__all__ = ["Readers", "size_of"]

SHORT: Final = 1 << 16
"""Characters or tokens that are read in well under a tenth of a second."""


class Readers:
    """Two ways in: one for short prompts and one for long ones, one thread each."""

    def __init__(self) -> None:
        self._short = anyio.CapacityLimiter(1)
        self._long = anyio.CapacityLimiter(1)
        # Threads that nobody waits for any more hold the limiter no longer, but this.
        self._turns = {self._short: threading.Lock(), self._long: threading.Lock()}

    async def read(self, prepare: Callable[[], Prompt], size: int, done: Callable[[], None]) -> Prompt:
        """Return what ``prepare`` returns, called in a thread. ``size``: see ``size_of``.

        ``done`` is called when no thread works on it any more, in whatever thread. Raises what ``prepare``
        raises, and ``InvalidRequestError`` in place of what would end the process.
        """
        limiter = self._short if size <= SHORT else self._long
        state = _Reading(prepare, self._turns[limiter], done)
        try:
            return await anyio.to_thread.run_sync(state.run, abandon_on_cancel=True, limiter=limiter)
        finally:
            state.leave()


class _Reading:
    """One prompt on its way; ``done`` is called once, by whoever comes last."""

    def __init__(self, prepare: Callable[[], Prompt], turn: threading.Lock, done: Callable[[], None]) -> None:
        self._prepare = prepare
        self._turn = turn
        self._done = done
        self._guard = threading.Lock()
        self._is_running = self._was_left = self._is_done = False

    def run(self) -> Prompt:
        with self._turn:
            with self._guard:
                if self._was_left:
                    raise InvalidRequestError("the caller has left")
                self._is_running = True
            try:
                return self._prepare()
            except Exception:
                raise
            except BaseException as error:
                raise InvalidRequestError(
                    f"the prompt could not be read: {type(error).__name__}: {error}"
                ) from error
            finally:
                self._finish(is_thread=True)

    def leave(self) -> None:
        """The caller waits no more."""
        self._finish(is_thread=False)

    def _finish(self, *, is_thread: bool) -> None:
        with self._guard:
            if is_thread:
                self._is_running = False
            else:
                self._was_left = True
            is_last = self._was_left and not self._is_running and not self._is_done
            self._is_done = self._is_done or is_last
        if is_last:
            self._done()


def size_of(request: Request) -> int:
    """Return how much there is to read: characters, or tokens where those are given."""
    if request.token_ids is not None:
        return len(request.token_ids)
    if request.messages is not None:
        return sum(_length(message.get("content")) for message in request.messages)
    return len(request.text or "")


def _length(content: Any) -> int:
    if isinstance(content, str):
        return len(content)
    if isinstance(content, list | tuple):
        return sum(_length(part.get("text") if isinstance(part, dict) else part) for part in content)
    return 0
