"""Whatever happens to an engine's event loop, tasks, lane or door: every caller hears of it."""

import asyncio
import threading
from contextlib import AsyncExitStack

import anyio
import anyio.lowlevel
import anyio.to_thread
import numpy as np
import pytest
import trio

from kvhybrid import ClosedError, InvalidRequestError, OverloadedError, UnsupportedError
from kvhybrid.engine.scheduler import PRIORITY_S, UNHURRIED_S, rank_of

REQUEST = {"text": "good morrow", "max_length": 3}


def in_another_thread(backend, make):
    """Run an async function in an event loop of another thread; return what it raises."""
    found = []

    def run():
        try:
            asyncio.run(make()) if backend == "asyncio" else trio.run(make)
        except BaseException as error:  # noqa: BLE001  # to be looked at by the test
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0] if found else None


@pytest.mark.parametrize("elsewhere", ["asyncio", "trio"])
async def test_an_engine_asked_from_another_event_loop_says_so_at_once(make_engine, balanced, elsewhere):
    async with make_engine() as engine:
        session = engine.session("a")
        stream = engine.stream(REQUEST)

        async def drain():
            async for _ in stream:
                pass

        calls = [
            lambda: engine.process_request(REQUEST),
            lambda: session.send("good morrow", max_length=3),
            drain,
            lambda: engine.__aexit__(None, None, None),
        ]
        for call in calls:
            error = await anyio.to_thread.run_sync(in_another_thread, elsewhere, call)
            assert isinstance(error, UnsupportedError)
        # At home it goes on, the session included.
        assert (await engine.process_request(REQUEST))["completion_tokens"] == 3
        assert (await session.send("good morrow", max_length=3))["completion_tokens"] == 3
        balanced(engine)


async def test_a_stream_closed_in_another_event_loop_ends_its_request(make_engine, llama, gate, balanced):
    async with make_engine() as engine:
        held = gate(llama)
        stream = engine.stream({"text": "good morrow", "max_length": 30})
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stream.__anext__)
            await held.reached()
            held.open()
        error = await anyio.to_thread.run_sync(in_another_thread, "asyncio", stream.aclose)
        assert error is None
        while engine.get_stats()["running"]:
            await anyio.lowlevel.checkpoint()
        balanced(engine)


async def test_an_engine_is_entered_in_one_task_and_left_in_another(make_engine, balanced):
    stack = AsyncExitStack()
    engine = make_engine()

    async def enter():
        await stack.enter_async_context(engine)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(enter)
    assert (await engine.process_request(REQUEST))["completion_tokens"] == 3
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stack.aclose)
    balanced(engine)
    with pytest.raises(ClosedError):
        await engine.process_request(REQUEST)


async def test_engines_are_left_in_any_order(make_engine, balanced):
    engines = [make_engine(), make_engine(), make_engine()]
    for engine in engines:
        await engine.__aenter__()
    for engine in (engines[1], engines[0], engines[2]):
        assert (await engine.process_request(REQUEST))["completion_tokens"] == 3
        await engine.__aexit__(None, None, None)
        balanced(engine)


def test_an_engine_whose_event_loop_has_ended_is_left_in_another(make_engine, balanced):
    engine = make_engine()

    async def enter():
        await engine.__aenter__()
        assert (await engine.process_request(REQUEST))["completion_tokens"] == 3

    async def leave():
        with pytest.raises(UnsupportedError):
            await engine.process_request(REQUEST)
        await engine.__aexit__(None, None, None)

    asyncio.run(enter())
    asyncio.run(leave())
    balanced(engine)


class Panicking(BaseException):
    """Stands for a panic of the native core, which is no ``Exception`` either."""


FAULTS = [SystemExit(3), KeyboardInterrupt(), Panicking("out of books"), GeneratorExit()]


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
async def test_what_ends_the_lane_is_told_to_everyone(make_engine, llama, fault, monkeypatch, balanced):
    errors = []
    async with make_engine(num_workers=2) as engine:
        await engine.process_request(REQUEST)

        def fail(*args, **kwargs):
            raise fault

        monkeypatch.setattr(engine._runner, "run", fail)

        async def ask():
            with pytest.raises(ClosedError) as caught:
                await engine.process_request(REQUEST)
            errors.append(caught.value)

        async with anyio.create_task_group() as tasks:
            for _ in range(5):  # two run, the others are queued
                tasks.start_soon(ask)
        with pytest.raises(ClosedError, match=type(fault).__name__):
            await engine.process_request(REQUEST)
        with pytest.raises(ClosedError, match=type(fault).__name__):
            engine.session("a")
    assert all(error.__cause__ is fault for error in errors)
    assert len(errors) == 5
    balanced(engine)


async def test_a_pool_that_takes_nothing_back_keeps_no_one(make_engine, monkeypatch):
    async with make_engine() as engine:

        def fail(*args, **kwargs):
            raise Panicking("out of books")

        monkeypatch.setattr(engine._runner, "run", fail)
        monkeypatch.setattr("kvhybrid.engine.running.Running.close", fail)
        monkeypatch.setattr(engine.cache, "close", fail)
        with pytest.raises(ClosedError, match="out of books"):
            await engine.process_request(REQUEST)


@pytest.mark.parametrize("fault", FAULTS, ids=repr)
async def test_what_would_end_the_door_is_an_error_of_one_request(make_engine, fault, monkeypatch, balanced):
    async with make_engine() as engine:
        with monkeypatch.context() as patch:

            def fail(*args, **kwargs):
                raise fault

            patch.setattr(engine._door, "encode", fail)
            with pytest.raises(InvalidRequestError, match=type(fault).__name__):
                await engine.process_request(REQUEST)
        assert (await engine.process_request(REQUEST))["completion_tokens"] == 3
        balanced(engine)


class SlowDoor:
    """Holds the reading of long prompts until it is opened."""

    def __init__(self, engine, monkeypatch):
        self.opened = threading.Event()
        self.reached = threading.Event()
        encode = engine._door.encode

        def held(text, **options):
            if len(text) > 1000:
                self.reached.set()
                assert self.opened.wait(30)
            return encode(text, **options)

        monkeypatch.setattr(engine._door, "encode", held)


async def test_a_deadline_ends_a_request_whose_prompt_is_being_read(make_engine, monkeypatch, balanced):
    async with make_engine(max_queued=2) as engine:
        door = SlowDoor(engine, monkeypatch)
        with pytest.raises(TimeoutError):
            await engine.process_request({"text": "x" * 70_000, "max_length": 1, "deadline": 0.01})
        # Its thread works on, and takes a place until it is done.
        assert engine.get_stats()["queued"] == 1
        assert (await engine.process_request(REQUEST))["completion_tokens"] == 3
        door.opened.set()
        while engine.get_stats()["queued"]:
            await anyio.lowlevel.checkpoint()
        balanced(engine)


async def test_a_long_text_holds_up_no_short_one(make_engine, monkeypatch):
    async with make_engine() as engine, anyio.create_task_group() as tasks:
        door = SlowDoor(engine, monkeypatch)
        tasks.start_soon(refused, engine, {"text": "x" * 70_000, "max_length": 1})
        while not door.reached.is_set():
            await anyio.lowlevel.checkpoint()
        assert (await engine.process_request(REQUEST))["completion_tokens"] == 3
        door.opened.set()


async def refused(engine, request, error=Exception):
    with pytest.raises(error):
        await engine.process_request(request)


async def served(engine, request):
    assert (await engine.process_request(request))["completion_tokens"] == 3


async def test_a_full_queue_has_room_for_what_is_more_important(make_engine, llama, gate, balanced):
    async with make_engine(num_workers=1, max_queued=3) as engine:
        held = gate(llama)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.process_request, REQUEST)
            await held.reached()
            waiting = []
            for priority in (-5, 0, 7, 6, 7):  # the last two in place of the first two
                ends = served if priority > 0 else refused
                tasks.start_soon(ends, engine, {**REQUEST, "priority": priority})
                waiting = sorted([*waiting, priority])[-3:]
                await queued(engine, lambda waiting=waiting: priorities(engine) == waiting)
            await refused(engine, {**REQUEST, "priority": 6}, OverloadedError)
            held.open()
        balanced(engine)


async def queued(engine, condition):
    while not condition():
        await anyio.lowlevel.checkpoint()
    assert len(engine._scheduler) <= engine._scheduler.max_queued


def priorities(engine):
    return sorted(row.request.priority for row in engine._scheduler._queued.values())


async def test_a_tenant_that_fills_the_queue_makes_room_for_others(make_engine, llama, gate, balanced):
    outcomes = []

    async def ask(engine, tenant):
        try:
            await engine.process_request({**REQUEST, "tenant": tenant})
        except OverloadedError:
            outcomes.append((tenant, "overloaded"))
        else:
            outcomes.append((tenant, "served"))

    async with make_engine(num_workers=1, max_queued=6) as engine:
        held = gate(llama)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, engine, "flood")
            await held.reached()
            for _ in range(9):
                tasks.start_soon(ask, engine, "flood")
            await queued(engine, lambda: len(outcomes) == 3)
            for tenant in ("one", "two", "one", "one", "two"):
                tasks.start_soon(ask, engine, tenant)
            await queued(engine, lambda: engine._scheduler._places.total() == 6 and len(outcomes) == 8)
            held.open()
        balanced(engine)
    served = [tenant for tenant, outcome in outcomes if outcome == "served"]
    assert {tenant: served.count(tenant) for tenant in served} == {"flood": 3, "one": 2, "two": 2}


def test_nobody_is_overtaken_for_ever():
    generator = np.random.default_rng(4)
    for _ in range(2000):
        (arrived, later), (deadline, other) = (
            np.sort(generator.uniform(0, 5000, 2)),
            generator.uniform(0.1, 100, 2),
        )
        priority, urgent = generator.integers(-100, 101, 2)
        most = PRIORITY_S * max(urgent - priority, 0) + UNHURRIED_S
        if later > arrived + most:
            assert rank_of(arrived, deadline, priority) < rank_of(later, other, urgent)
    # And within that: priority, then the nearer deadline, then arrival.
    assert rank_of(1.0, 50.0, 1) < rank_of(0.0, 0.1, 0)
    assert rank_of(0.1, 50.0, 0) < rank_of(0.0, 60.0, 0) < rank_of(0.0, float("inf"), 0)
    assert rank_of(0.0, 5.0, 0) < rank_of(0.1, 5.0, 0)
