"""``Driver``: keeps a lane stepping while there is work. Takes from the queue, and brings the news.

No task waits here: the lane's thread posts what a step came to into the event loop, and the call that takes
it up starts the next step. So an engine can be entered in one task and left in another, nothing waits for a
wake-up that could be missed, and whatever ends the thread is told to every caller. Everything here costs the
event loop a few dictionary operations a running request and step; whatever takes longer is the lane's.
"""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import anyio

from kvhybrid.engine.home import Home
from kvhybrid.engine.lane import Outcome
from kvhybrid.engine.statistics import Statistics
from kvhybrid.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvhybrid.cache.hints import Hints
    from kvhybrid.engine.lane import Lane
    from kvhybrid.engine.recorder import Recorder
    from kvhybrid.engine.running import Running
    from kvhybrid.engine.scheduler import Scheduler
    from kvhybrid.engine.ticket import Ticket

__all__ = ["Driver"]

# How long a caller that gives up waits for the step in flight before it leaves without its pages.
PATIENCE_S = 30.0
_CLOSED = "the engine was closed before the request was done"


class Driver:
    """Drives ``lane``. ``max_running``: most rows at once; may be changed while it runs.

    Made in the event loop that it lives in.
    """

    def __init__(self, lane: Lane, scheduler: Scheduler, max_running: int, hints: Hints) -> None:
        self.max_running = max_running
        self.statistics = Statistics()
        self.recorder: Recorder | None = None
        self.is_running = True
        self.fault: BaseException | None = None
        """What ended the lane, if anything has."""
        self.has_ended = anyio.Event()
        self.home = Home()
        self._lane = lane
        self._scheduler = scheduler
        self._hints = hints
        self._tickets: dict[int, Ticket] = {}
        self._work: SimpleQueue[list[Running] | None] = SimpleQueue()  # for the thread; None ends it
        self._is_stepping = False
        self._is_woken = False
        self._is_stopping = False
        self._began = 0.0
        # One thread from first step to last: torch keeps a team of workers for each thread that calls it.
        self._thread = threading.Thread(target=self._serve, name="kvhybrid lane", daemon=True)
        self._thread.start()

    @property
    def num_running(self) -> int:
        """Requests that were let in and are neither queued nor over."""
        return len(self._tickets) - len(self._scheduler)

    def _serve(self) -> None:
        """Step whenever the event loop says so. Runs in the lane's thread."""
        while (candidates := self._work.get()) is not None:
            outcome = self._stepped(candidates)
            if not self.home.post(self._arrive, outcome):
                self._end(ClosedError("the event loop that the engine lived in has ended"))
                return

    def _stepped(self, candidates: list[Running]) -> Outcome:
        try:
            return self._lane.step(candidates)
        except Exception as error:  # noqa: BLE001  # a defect of ours must not end the engine
            cause = error
        except BaseException as error:  # noqa: BLE001  # a panic of the core, or somebody's exit
            return Outcome(fault=error)
        try:
            return self._lane.fail(candidates, cause)
        except BaseException as error:  # noqa: BLE001  # not even pages can be given back
            return Outcome(fault=error)

    def _arrive(self, outcome: Outcome) -> None:
        """Take up what a step came to, and start the next. Runs in the event loop, and never raises."""
        self._is_stepping = False
        try:
            self._count(outcome, (time.perf_counter() - self._began) * 1e3)
            self._deliver(outcome)
        except BaseException as error:  # noqa: BLE001  # nobody above hears of it
            outcome.fault = outcome.fault or error
        if outcome.fault is not None:
            self._fail(outcome.fault)
        self._go_on()

    def _fail(self, fault: BaseException) -> None:
        """End every request, because the lane cannot go on."""
        self.fault = fault
        logging.getLogger(__name__).error("the lane has ended", exc_info=fault)
        error = ClosedError(f"the engine has ended: {type(fault).__name__}: {fault}")
        error.__cause__ = fault
        self._end(error)

    def _wake(self) -> None:
        """Go on soon: requests that come in one turn of the event loop begin in one step."""
        if not self._is_woken and not self._is_stepping:
            self._is_woken = self.home.post(self._go_on)

    def _go_on(self) -> None:
        self._is_woken = False
        if self._is_stepping or not self.is_running:
            return
        if self._is_stopping:
            self._end(ClosedError(_CLOSED))
        elif self._scheduler or self._lane.rows:
            candidates: list[Running] = []
            if self._lane.has_room():
                candidates = self._scheduler.pop(self.max_running - len(self._lane.rows))
            self._is_stepping, self._began = True, time.perf_counter()
            self._work.put(candidates)

    def submit(self, ticket: Ticket) -> None:
        """Queue a request."""
        running = ticket.running
        self._tickets[running.key] = ticket
        self._hints.hold(running.key, running.tokens, running.namespace)
        self._scheduler.push([running])
        self.statistics.requests += 1
        self._wake()

    def displace(self, running: Running, error: Exception) -> None:
        """End a queued request in favour of another."""
        self.statistics.refused += 1
        self._hints.drop(running.key)
        self._tickets.pop(running.key).fail(error)

    async def abandon(self, ticket: Ticket) -> None:
        """End a request whose caller leaves, and return when its pages are free.

        They are as soon as the step in flight is over; a cancelled caller waits for that, too. A caller in
        another event loop does not wait.
        """
        ticket.running.cancelled = True
        if not self.home.is_here:
            self.home.post(self._withdraw, ticket.running)
            return
        self._withdraw(ticket.running)
        with anyio.move_on_after(PATIENCE_S, shield=True):
            await ticket.released.wait()

    def _withdraw(self, running: Running) -> None:
        if self._scheduler.discard(running):
            self._leave(running)
        self._wake()

    def stop(self) -> None:
        """End once the step in flight is over: ``has_ended`` is set then."""
        self._is_stopping = True
        self._wake()

    def end_elsewhere(self) -> None:
        """End in another event loop, because the one that this lived in has ended. Waits for the step."""
        self._work.put(None)
        self._thread.join()
        if self.is_running:
            self._end(ClosedError(_CLOSED))

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

    def _end(self, error: Exception) -> None:
        if not self.is_running:
            return
        self.is_running = False
        self._work.put(None)
        tickets, self._tickets = self._tickets, {}
        closing: list[Callable[[], None]] = [self._lane.close]
        for key, ticket in tickets.items():
            closing += (ticket.running.close, partial(self._hints.drop, key))
        for close in closing:
            try:
                close()
            except BaseException:
                # After a panic of the core no page can be given back: the cache is closed next.
                logging.getLogger(__name__).debug("pages could not be given back", exc_info=True)
        for ticket in tickets.values():
            ticket.fail(error)
        if self.home.is_here:
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
        if self.fault is not None:
            state += f" ({type(self.fault).__name__}: {self.fault})"
        return {
            "lane": (self.is_running and failures < 3, f"{state}, {failures} failed steps in a row"),
            "queue": (waiting < bound, f"{waiting} of {bound} places taken, {self.num_running} requests run"),
        }
