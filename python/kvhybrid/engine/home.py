"""``Home``: the event loop that an engine lives in, and the way there from other threads."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from anyio.lowlevel import current_token

from kvhybrid.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Home"]


class Home:
    """The event loop, asyncio's or trio's, in which this was made."""

    def __init__(self) -> None:
        loop: Any = current_token().native_token  # asyncio's loop, or trio's token
        self._loop = loop
        self._post = getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon

    @property
    def is_here(self) -> bool:
        """Return whether the caller runs in this event loop, be it in a task or in a call that was posted."""
        try:
            if isinstance(self._loop, asyncio.AbstractEventLoop):
                return asyncio.get_running_loop() is self._loop
            return current_token().native_token is self._loop
        except RuntimeError:  # no event loop runs in this thread
            return False

    def check(self) -> None:
        """Raise ``UnsupportedError`` for callers of another event loop: nothing here would wake them."""
        if not self.is_here:
            raise UnsupportedError(
                "the engine was entered in another event loop: call it there, for example with "
                "asyncio.run_coroutine_threadsafe or anyio.from_thread.run"
            )

    def post(self, call: Callable[..., object], *args: object) -> bool:
        """Have the event loop make a call soon, from any thread; False when it runs no more.

        The call must not raise.
        """
        try:
            self._post(call, *args)
        except RuntimeError:  # closed, or trio has ended
            return False
        return True
