"""Cancelled at any await, a request takes its pages along and leaves the others alone."""

import random

import anyio
import anyio.lowlevel
import pytest
from families import make_model

CANCELLED = 500  # on each event loop


@pytest.fixture(scope="module")
def two_layers():
    model = make_model("llama")
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model


class Tally:
    """Calls that ended by cancellation, and those that were done before it came."""

    cancelled = finished = 0


async def ask_and_cancel(call, pulse, steps, checkpoints, tally):
    """Run ``call`` and cancel it some steps and then some turns of the event loop later."""
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:

            async def cancel():
                await pulse.beats(steps)
                for _ in range(checkpoints):
                    await anyio.lowlevel.checkpoint()
                scope.cancel()

            tasks.start_soon(cancel)
            await call()
            tasks.cancel_scope.cancel()
    if scope.cancelled_caught:
        tally.cancelled += 1
    else:
        tally.finished += 1


async def read_some(engine, request, count):
    """Read ``count`` pieces of a stream, then cancel the reader."""
    with anyio.CancelScope() as scope:
        read = 0
        async for _ in engine.stream(request):
            read += 1
            if read == count:
                scope.cancel()
    return scope.cancelled_caught


@pytest.mark.parametrize("max_tokens", [2048, 192], ids=["roomy", "tight"])
async def test_seeded_random_cancellations_leave_balanced_books(
    make_engine, two_layers, balanced, pulse, max_tokens
):
    draw = random.Random(20240607 + max_tokens)
    tally = Tally()
    shared = "a shared opening of some length, "
    survivor = {"text": shared + "and one who stays", "max_length": 8, "priority": 1}
    async with make_engine(two_layers, max_tokens=max_tokens, num_workers=6, prefill_tokens=24) as engine:
        expected = (await engine.process_request(survivor))["text"]
        texts, steps_of = [], pulse(engine)

        async def stay():
            texts.append((await engine.process_request(survivor))["text"])

        async def stream(request, count):
            left_early = await read_some(engine, request, count)
            tally.cancelled += left_early

        rounds = 0
        while tally.cancelled < CANCELLED // 2:
            rounds += 1
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(stay)
                for _ in range(20):
                    text = shared[: draw.randrange(1, len(shared))] + str(draw.randrange(1000))
                    request = {
                        "text": text,
                        "max_length": draw.randrange(60, 100),
                        "priority": draw.randrange(3),
                    }
                    if draw.random() < 0.3:
                        tasks.start_soon(stream, request, draw.randrange(1, 10))
                        continue
                    session = engine.session(str(draw.randrange(10**9)))
                    choice = draw.random()
                    if choice < 0.5:
                        call = lambda request=request: engine.process_request(request)  # noqa: E731
                    else:
                        call = lambda session=session, text=text: session.send(text, max_length=90)  # noqa: E731
                    # Some are cancelled at the door, some in the queue, some while they run.
                    steps, turns = draw.randrange(10), int(60 ** draw.random())
                    tasks.start_soon(ask_and_cancel, call, steps_of, steps, turns, tally)
            assert engine.get_stats()["running"] == engine.get_stats()["queued"] == 0
            balanced(engine)
            assert await engine.get_health_status()
        assert rounds >= 10
        assert texts == [expected] * rounds
        assert tally.cancelled > 4 * tally.finished
        assert engine.get_stats()["cancelled"] > tally.cancelled * 0.4  # the others never got past the door
        assert engine.get_stats()["failed"] == 0


async def test_a_request_cancelled_inside_a_step_leaves_when_the_step_is_over(
    make_engine, llama, gate, balanced
):
    async with make_engine() as engine:
        held = gate(llama)
        done = []

        async def ask(scope):
            with scope:
                await engine.process_request({"text": "hello", "max_length": 50})
            done.append(scope.cancelled_caught)

        async with anyio.create_task_group() as tasks:
            scope = anyio.CancelScope()
            tasks.start_soon(ask, scope)
            await held.reached()
            scope.cancel()
            for _ in range(50):
                await anyio.lowlevel.checkpoint()
            assert not done
            held.open()
        assert done == [True]
        balanced(engine)
        # What the step computed was not in vain.
        assert engine.get_stats()["computed_tokens"] == 5


async def test_cancelling_one_leaves_the_others_text_alone(make_engine, balanced):
    requests = [{"text": f"number {i} of many", "max_length": 25} for i in range(6)]
    async with make_engine() as engine:
        expected = [(await engine.process_request(request))["text"] for request in requests]
        for gone in range(6):
            found = {}

            async def ask(index, found=found):
                found[index] = (await engine.process_request(requests[index]))["text"]

            async with anyio.create_task_group() as tasks:
                for index in range(6):
                    if index == gone:
                        tasks.start_soon(read_some, engine, requests[index], 1 + 3 * index)
                    else:
                        tasks.start_soon(ask, index)
            assert found == {i: text for i, text in enumerate(expected) if i != gone}
            balanced(engine)
