"""``KVEngine``: requests in, answers out, many at once, over one model and one cache.

The async front of the package. Owns its lane's thread and everything that it started: nothing outlives
``async with``, which may be entered in one task and left in another of the same event loop.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import anyio
import anyio.to_thread

from kvhybrid.cache.compress.scorers import NEED_QUERIES
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.engine.door import Door
from kvhybrid.engine.driver import Driver
from kvhybrid.engine.held import Held
from kvhybrid.engine.intake import Intake
from kvhybrid.engine.lane import Lane
from kvhybrid.engine.recorder import Recorder
from kvhybrid.engine.request import Request, check_names
from kvhybrid.engine.scheduler import Scheduler
from kvhybrid.engine.session import Session
from kvhybrid.engine.statistics import Health
from kvhybrid.errors import ClosedError, ConfigError, InvalidRequestError
from kvhybrid.model.compression import Compression
from kvhybrid.model.interface import model_number
from kvhybrid.model.load import load_model
from kvhybrid.model.original import plain_forward
from kvhybrid.model.packing import choose_packing
from kvhybrid.model.probe_compression import obstacle_to_compression
from kvhybrid.model.routes import Route
from kvhybrid.model.runner import Packing, Runner
from kvhybrid.model.tenancy import ModelNamespaces
from kvhybrid.model.threads import in_own_thread
from kvhybrid.model.weights import ModelState
from kvhybrid.presets import CompressionScorer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kvhybrid.config import KVCacheConfig
    from kvhybrid.engine.stream import Stream

__all__ = ["KVEngine"]


class KVEngine:
    """Serves requests through one model, every cached prefix reused.

        async with KVEngine() as engine:
            answer = await engine.process_request({"text": "Once upon a time"})

    ``model``: a loaded transformers model, the path of a local one, or None for the embedded model.
    ``max_queued``: most requests that wait; the next is refused. ``prefill_tokens``: most tokens of one
    step, so that a long prompt does not hold up those that are answering.

    Building one loads the model and tries it on a few tokens, which takes its time: build it before the
    event loop has anything else to do. Raises ``LayoutError`` or ``UnsupportedError`` for a model that
    has no attention or that cannot be served, ``ConfigError`` for wrong settings, ``UnsupportedError`` with
    ``use_compression`` for one whose texts cannot be compressed.

    Works on asyncio and trio. Leaving ``async with`` cancels what still runs: its callers get
    ``ClosedError``, and every page is free. An engine is entered once, and lives in the event loop that it
    was entered in: asked from another one, it raises ``UnsupportedError``. When its lane ends (a panic of the
    native core, ``SystemExit`` in a hook), every request gets ``ClosedError`` with the cause.
    """

    def __init__(
        self,
        model: PreTrainedModel | str | Path | None = None,
        config: KVCacheConfig | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        max_queued: int = 256,
        prefill_tokens: int = 512,
    ) -> None:
        _check_count("max_queued", max_queued, 2**31 - 1)
        _check_count("prefill_tokens", prefill_tokens, 2**31 - 1)
        if config is not None and config.use_compression and config.compression_scorer in NEED_QUERIES:
            raise ConfigError(
                f"compression_scorer={config.compression_scorer.value!r}: scores by queries, which an engine "
                f"does not keep: use one of {', '.join(sorted(set(CompressionScorer) - NEED_QUERIES))}"
            )
        self.model, self.tokenizer = load_model(model, tokenizer=tokenizer, device=device, dtype=dtype)
        self.cache = KVCache.for_model(self.model, config)
        self.packing, self.packing_reason = in_own_thread(
            choose_packing, self.model, self.cache.layout, alone=self.cache.config.reproducible
        )
        route = Route.PAGED if self.packing is Packing.RAGGED else Route.MATERIALISED
        self._compression = in_own_thread(
            Compression,
            self.cache.config,
            sees_queries=False,
            obstacle=partial(
                obstacle_to_compression, self.model, plain_forward(self.model), self.cache.layout, route
            ),
        )
        capacity = self.cache.pool.num_pages * self.cache.layout.block_size
        self._state = ModelState.of(self.model)
        self._namespaces = ModelNamespaces(self._state, self.cache, model_number(self.model))
        self._door = Door(self.model, self.tokenizer, capacity)
        self._scheduler = Scheduler(max_queued)
        self._prefill_tokens = prefill_tokens
        self._sessions: dict[tuple[str, str], Session] = {}
        self._was_entered = False
        self._runner: Runner | None = None
        self._driver: Driver | None = None
        self._intake: Intake | None = None

    async def __aenter__(self) -> Self:
        if self._was_entered:
            raise ClosedError("an engine can be entered once: build another")
        self._was_entered = True
        self._runner = Runner(self.model, self.cache.storage, self.packing, watching=self._state.learning)
        lane = Lane(self._runner, self.cache, self._prefill_tokens, self._state.look)
        self._driver = Driver(lane, self._scheduler, self.cache.config.num_workers, self.cache.hints)
        self._intake = Intake(self._door, self._scheduler, self._driver, self.cache, self._namespaces)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        driver = self._driver
        assert driver is not None
        if driver.home.is_here:
            driver.stop()
            with anyio.CancelScope(shield=True):
                await driver.has_ended.wait()
        elif driver.home.post(_nothing):
            driver.home.check()  # it runs on elsewhere
        else:
            with anyio.CancelScope(shield=True):
                await anyio.to_thread.run_sync(driver.end_elsewhere)
        with ExitStack() as closing:
            if driver.fault is not None:  # what ended the lane may keep pages from being given back
                closing.enter_context(suppress(BaseException))
            closing.callback(self._sessions.clear)
            closing.callback(self.cache.close)
            for session in self._sessions.values():
                closing.callback(session.let_go)
            closing.callback(self._state.leave)
            if self._runner is not None:
                closing.callback(self._runner.close)
            closing.callback(self.stop_recording)

    async def process_request(self, request: Mapping[str, Any] | Request) -> dict[str, Any]:
        """Answer one request.

        Returns ``text``, ``token_ids``, ``cached``, ``cached_tokens``, ``prompt_tokens``,
        ``completion_tokens``, ``session_id``, ``finish_reason`` ("stop" or "length"),
        ``time_to_first_token_ms`` and ``latency_ms``. Cancelling the call frees its pages before it
        returns, as soon as the step in flight is over.

        Raises ``InvalidRequestError`` naming field and value; ``CapacityError`` when prompt and answer do
        not fit into the budget; ``OverloadedError`` when the queue is full; ``TimeoutError`` past the
        deadline; ``ClosedError`` outside ``async with``; and whatever the model raises.
        """
        intake = self._serving()
        parsed = self._parse(request)
        return (await intake.run(parsed, partial(self._door.prepare, parsed))).answer()

    def stream(self, request: Mapping[str, Any] | Request) -> Stream:
        """Answer one request piece by piece: an async iterator of ``Piece``, a ``str`` with ``token_id``.

        Raises as ``process_request`` does, here or at the first piece. Leaving early stops the work; use
        ``async with`` or ``contextlib.aclosing`` to have its pages free when the block is left.
        """
        intake = self._serving()
        parsed = self._parse(request)
        return intake.stream(parsed, partial(self._door.prepare, parsed))

    def session(
        self, session_id: str = "default", *, tenant: str = "default", keep_reasoning: bool = False
    ) -> Session:
        """Return the conversation of that id and tenant: the same one until it is dropped.

        Raises ``UnsupportedError`` when the chat template renders turns differently once others follow, so
        that nothing can be appended. ``keep_reasoning``: begin it although the template would leave out
        what the model reasoned in earlier answers; in the conversation it stays.
        """
        intake = self._serving()
        check_names(session_id=session_id, tenant=tenant)
        key = (tenant, session_id)
        if key not in self._sessions:
            self._door.check_appending(keep_reasoning=keep_reasoning)
            held = Held(self.cache, self._compression) if self._compression.kept < 1.0 else None
            self._sessions[key] = Session(session_id, tenant, intake, self.cache, held)
        return self._sessions[key]

    def drop_session(self, session_id: str = "default", *, tenant: str = "default") -> bool:
        """Forget a conversation. True if it was known.

        Its pages stay cached until they are evicted, those that are nobody else's before all others.
        """
        self._serving()
        session = self._sessions.pop((tenant, session_id), None)
        if session is not None:
            session.drop()
        return session is not None

    def weights_changed(self) -> None:
        """Say that the model computes something else now, so that nothing computed before is found.

        Nearly every change is noticed without it: ``docs/model-state.md`` says which are not.
        """
        self._state.weights_changed()

    @property
    def num_workers(self) -> int:
        """Most requests that run at once, 1 to 128; takes effect at the next step, and ends none."""
        return self._driver.max_running if self._driver else self.cache.config.num_workers

    @num_workers.setter
    def num_workers(self, value: int) -> None:
        _check_count("num_workers", value, 128)
        self._serving()
        assert self._driver is not None
        self._driver.max_running = value

    async def get_health_status(self) -> Health:
        """Return ``{"status", "checks"}``, which is true when healthy.

        Checks: the ``lane`` runs and its last steps did not all fail, the ``queue`` takes requests, the
        books of the ``cache`` balance.
        """
        self._serving()
        assert self._driver is not None
        pages = self.cache.pool.statistics()
        known = pages["free_pages"] + pages["mutable_pages"] + pages["sealed_pages"]
        books = f"{known} of {pages['num_pages']} pages are accounted for, {pages['free_pages']} of them free"
        return Health.of(**self._driver.checks(), cache=(known == pages["num_pages"], books))

    def record(self, path: Path | str) -> Recorder:
        """Write what is served from now on to a new file, for ``kvhybrid simulate``; hashes only, no text.

        A request is written when it has ended, with its time, its lengths, and its prompt's blocks as
        numbers. Closing the recorder, or the engine, finishes the file. Raises ``OSError`` when there is one.
        """
        self._serving()
        assert self._driver is not None
        self.stop_recording()
        config = self.cache.config
        block_size, by_tenant = self.cache.layout.block_size, config.tenant_isolation
        self._driver.recorder = Recorder(Path(path), block_size=block_size, by_tenant=by_tenant)
        return self._driver.recorder

    def stop_recording(self) -> None:
        """Finish the file that ``record`` began. Nothing happens when there is none."""
        if self._driver is not None and self._driver.recorder is not None:
            self._driver.recorder.close()
            self._driver.recorder = None

    def get_stats(self) -> dict[str, int | float]:
        """Return the cache's statistics and the engine's, flat and JSON-ready.

        ``sessions`` counts conversations; ``running`` and ``queued`` requests are as of now; the rest are
        totals, and percentiles in ``*_ms`` over the last 1024.
        """
        self._serving()
        assert self._driver is not None
        return {
            **self.cache.get_stats(),
            **self._driver.statistics.flat(),
            "running": self._driver.num_running,
            "queued": self._scheduler.places_taken,
            "num_workers": self._driver.max_running,
            "sessions": len(self._sessions),
        }

    def _serving(self) -> Intake:
        if self._intake is None:
            state = "was closed" if self._was_entered else "is not open: use `async with`"
            raise ClosedError(f"the engine {state}")
        self._intake.check_open()
        return self._intake

    def _parse(self, request: Mapping[str, Any] | Request) -> Request:
        try:
            return Request.parse(request)
        except InvalidRequestError:
            assert self._driver is not None
            self._driver.statistics.refused += 1
            raise

    def __repr__(self) -> str:
        if self._driver is None or not self._driver.is_running:
            state = "closed" if self._was_entered else "not open"
        else:
            state = f"{self._driver.num_running} requests run, {len(self._scheduler)} wait"
        return f"<KVEngine {type(self.model).__name__}, {self.packing}, {state}, {self.cache!r}>"


def _nothing() -> None:
    """Be called in an event loop, if it still runs."""


def _check_count(name: str, value: object, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise ConfigError(f"{name}={value!r}: must be a whole number from 1 to {most}")
