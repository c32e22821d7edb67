"""``Intake``: a request's way from the door to its answer, with its deadline and its way out.

Shared by the engine and its sessions. Whoever leaves on this way, cancelled or too late, takes the
request's pages along.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import anyio

from kvhybrid.engine.readers import Readers, size_of
from kvhybrid.engine.running import Running
from kvhybrid.engine.stream import Stream
from kvhybrid.engine.ticket import Ticket
from kvhybrid.errors import ClosedError, KVHybridError
from kvhybrid.model.grid import GRID
from kvhybrid.model.tenancy import Tenancy

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvhybrid.cache.kv_cache import KVCache
    from kvhybrid.engine.door import Door, Prompt
    from kvhybrid.engine.driver import Driver
    from kvhybrid.engine.request import Request
    from kvhybrid.engine.scheduler import Scheduler
    from kvhybrid.model.tenancy import ModelNamespaces

__all__ = ["Intake"]


class Intake:
    """Lets requests in. ``door`` reads prompts, in threads that are not the lane's."""

    def __init__(
        self,
        door: Door,
        scheduler: Scheduler,
        driver: Driver,
        cache: KVCache,
        namespaces: ModelNamespaces,
    ) -> None:
        self.door = door
        self._namespaces = namespaces
        self._scheduler = scheduler
        self._driver = driver
        self._cache = cache
        self._readers = Readers()

    async def run(self, request: Request, prepare: Callable[[], Prompt]) -> Ticket:
        """Serve a request and return its finished ticket.

        ``prepare`` runs in the door's thread. Raises what it raises, ``OverloadedError``, ``ClosedError``,
        ``TimeoutError`` past the deadline, or what the model raised.
        """
        self.check_here()
        with anyio.move_on_after(request.deadline) as scope:
            ticket = await self.submit(request, prepare)
            try:
                await ticket.wait()
            finally:
                if not ticket.is_over:
                    await self._driver.abandon(ticket)
            return ticket
        assert scope.cancelled_caught
        raise TimeoutError(f"the deadline of {request.deadline} s passed")

    def stream(
        self,
        request: Request,
        prepare: Callable[[], Prompt],
        on_end: Callable[[Ticket | None], None] | None = None,
    ) -> Stream:
        """Return a request's answer as a stream; ``on_end`` gets the ticket if it was finished, else None."""
        return Stream(
            partial(self.submit, request, prepare),
            self._driver.abandon,
            deadline=request.deadline,
            on_end=on_end,
        )

    async def submit(self, request: Request, prepare: Callable[[], Prompt]) -> Ticket:
        """Read a request's prompt and queue it."""
        started, arrived = time.perf_counter(), anyio.current_time()
        self.check_here()
        try:
            prompt = await self._read(request, prepare)
        except KVHybridError:
            self._driver.statistics.refused += 1
            raise
        self.check_open()
        running = Running(
            request,
            prompt,
            tenancy=Tenancy(self._namespaces, request.tenant),
            grid=max(GRID, self._cache.layout.block_size) if self._cache.config.reproducible else 0,
            end_ids=self.door.end_ids,
            tokenizer=self.door.tokenizer,
            arrived=arrived,
        )
        ticket = Ticket(running, started)
        self._driver.submit(ticket)
        return ticket

    async def _read(self, request: Request, prepare: Callable[[], Prompt]) -> Prompt:
        retry_after = self._driver.retry_after()
        place, displaced = self._scheduler.reserve(request.tenant, request.priority, retry_after)
        if displaced is not None:
            self._driver.displace(displaced, self._scheduler.overloaded(retry_after))
        # The place is the thread's, too: it may work on though nobody waits for it any more.
        home, leave_door = self._driver.home, partial(self._scheduler.leave_door, place)

        def leave() -> None:
            if home.is_here:
                leave_door()
            else:
                home.post(leave_door)

        prompt = await self._readers.read(prepare, size_of(request), leave)
        if place.is_lost:
            raise self._scheduler.overloaded(self._driver.retry_after())
        return prompt

    def check_open(self) -> None:
        """Raise ``ClosedError`` unless requests are served."""
        if self._driver.fault is not None:
            fault = self._driver.fault
            raise ClosedError(f"the engine has ended: {type(fault).__name__}: {fault}") from fault
        if not self._driver.is_running:
            raise ClosedError("the engine is closed")

    def check_here(self) -> None:
        """Raise ``ClosedError`` unless requests are served, ``UnsupportedError`` in another event loop."""
        self.check_open()
        self._driver.home.check()
