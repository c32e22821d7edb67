"""``Driver``: the one background task of a lane. Takes from the queue, has the lane step, brings the news.

Everything here costs the event loop a few dictionary operations a running request and step; whatever
takes longer is the lane's, in its thread.
"""

from __future__ import annotations

import logging
import time
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import anyio
import anyio.from_thread
import anyio.to_thread

from kvhybrid.engine.statistics import Statistics
from kvhybrid.errors import ClosedError

if TYPE_CHECKING:
    from kvhybrid.cache.hints import Hints
    from kvhybrid.engine.lane import Lane, Outcome
    from kvhybrid.engine.recorder import Recorder
    from kvhybrid.engine.running import Running
    from kvhybrid.engine.scheduler import Scheduler
    from kvhybrid.engine.ticket import Ticket

__all__ = ["Driver"]

# How long a caller that gives up waits for the step in flight before it leaves without its pages.
PATIENCE_S = 30.0


class Driver:
    """Drives ``lane``. ``max_running``: most rows at once; may be changed while it runs."""

    def __init__(self, lane: Lane, scheduler: Scheduler, max_running: int, hints: Hints) -> None:
        self.max_running = max_running
        self.statistics = Statistics()
        self.recorder: Recorder | None = None
        self.is_running = True
        self.has_ended = anyio.Event()
        self._lane = lane
        self._scheduler = scheduler
        self._hints = hints
        self._tickets: dict[int, Ticket] = {}
        self._work: SimpleQueue[list[Running] | None] = SimpleQueue()  # for the thread; None ends it
        self._outcome: Outcome | None = None
        self._wake = anyio.Event()
        self._stopping = False

    @property
    def num_running(self) -> int:
        """Requests that were let in and are neither queued nor over."""
        return len(self._tickets) - len(self._scheduler)

    async def run(self) -> None:
        """Step while there is work, until ``stop`` or cancellation; then end every request."""
        try:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._keep_thread)
                try:
                    while not self._stopping:
                        if self._scheduler or self._lane.rows:
                            await self._step()
                        else:
                            await self._sleep()
                finally:
                    self._work.put(None)
        finally:
            self._end()

    async def _keep_thread(self) -> None:
        # One thread from first step to last: torch keeps a team of workers for each thread that calls it.
        # A limiter of its own: nobody else's work in threads delays a step.
        await anyio.to_thread.run_sync(self._serve, limiter=anyio.CapacityLimiter(1))

    def _serve(self) -> None:
        """Step whenever the event loop says so. Runs in the lane's thread."""
        while (candidates := self._work.get()) is not None:
            try:
                outcome = self._lane.step(candidates)
            except Exception as error:  # noqa: BLE001  # a defect of ours must not end the engine
                outcome = self._lane.fail(candidates, error)
            anyio.from_thread.run_sync(self._arrive, outcome)

    def _arrive(self, outcome: Outcome) -> None:
        self._outcome = outcome
        self._wake.set()

    async def _sleep(self) -> None:
        self._wake = anyio.Event()
        await self._wake.wait()

    def submit(self, ticket: Ticket) -> None:
        """Queue a request."""
        running = ticket.running
        self._tickets[running.key] = ticket
        self._hints.hold(running.key, running.tokens, running.namespace)
        self._scheduler.push([running])
        self.statistics.requests += 1
        self._wake.set()

    async def abandon(self, ticket: Ticket) -> None:
        """End a request whose caller leaves, and return when its pages are free.

        They are as soon as the step in flight is over; a cancelled caller waits for that, too.
        """
        ticket.running.cancelled = True
        if self._scheduler.discard(ticket.running):
            self._leave(ticket.running)
        with anyio.move_on_after(PATIENCE_S, shield=True):
            await ticket.released.wait()

    def stop(self) -> None:
        """Ask ``run`` to return after the step in flight."""
        self._stopping = True
        self._wake.set()

    async def _step(self) -> None:
        candidates: list[Running] = []
        if self._lane.has_room():
            candidates = self._scheduler.pop(self.max_running - len(self._lane.rows))
        began = time.perf_counter()
        self._work.put(candidates)
        # Requests wake the driver, too: only an outcome ends the wait.
        while (outcome := self._outcome) is None:
            await self._sleep()
        self._outcome = None
        self._count(outcome, (time.perf_counter() - began) * 1e3)
        self._deliver(outcome)

    def _deliver(self, outcome: Outcome) -> None:
        for running, piece, reason in outcome.pieces:
            ticket = self._tickets[running.key]
            ticket.put(piece, reason)
            if reason is not None:
                del self._tickets[running.key]
                self.statistics.completed += 1
                self._record(running)
                self.statistics.time_to_first_token.add(ticket.time_to_first_token_ms)
                self.statistics.latency.add(ticket.latency_ms)
        for running, error in outcome.failed:
            self.statistics.failed += 1
            self._hints.drop(running.key)
            self._tickets.pop(running.key).fail(error)
        for running in outcome.left:
            self._leave(running)
        for running in outcome.waiting:
            if running.cancelled:
                self._leave(running)
            else:
                self._scheduler.push([running])

    def _record(self, running: Running) -> None:
        if self.recorder is None:
            return
        try:
            self.recorder.record(running)
        except OSError:
            # A full disk must not cost an answer; what was written so far is a trace.
            logging.getLogger(__name__).exception("recording has ended: the file cannot be written")
            self.recorder = None

    def _leave(self, running: Running) -> None:
        self.statistics.cancelled += 1
        self._hints.drop(running.key)
        self._tickets.pop(running.key).leave()

    def _count(self, outcome: Outcome, milliseconds: float) -> None:
        statistics = self.statistics
        if outcome.error is not None:
            statistics.failed_steps_in_a_row += 1
        if outcome.num_tokens:
            statistics.failed_steps_in_a_row = 0
            statistics.steps += 1
            statistics.step.add(milliseconds)
        statistics.preemptions += outcome.preemptions
        statistics.computed_tokens += outcome.num_tokens
        statistics.generated_tokens += len(outcome.pieces)

    def _end(self) -> None:
        self.is_running = False
        self._lane.close()
        tickets, self._tickets = self._tickets, {}
        for ticket in tickets.values():
            ticket.running.close()
            self._hints.drop(ticket.running.key)
            ticket.fail(ClosedError("the engine was closed before the request was done"))
        self.has_ended.set()

    def retry_after(self) -> float:
        """Return in how many seconds a request that is refused now should find a place."""
        turn = self.statistics.latency.mean(1000.0) / 1e3
        return max(turn * self._scheduler.places_taken / max(self.max_running, 1), 0.1)

    def checks(self) -> dict[str, Any]:
        """Return the state of lane and queue for a health check: whether each is well, and a word on it."""
        failures = self.statistics.failed_steps_in_a_row
        waiting, bound = self._scheduler.places_taken, self._scheduler.max_queued
        state = "runs" if self.is_running else "has ended"
        return {
            "lane": (self.is_running and failures < 3, f"{state}, {failures} failed steps in a row"),
            "queue": (waiting < bound, f"{waiting} of {bound} places taken, {self.num_running} requests run"),
        }
