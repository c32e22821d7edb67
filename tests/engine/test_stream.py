"""Streams: every token's text as it is made; whoever leaves takes the work along."""

import gc
from contextlib import aclosing

import anyio
import pytest

from kvhybrid.engine.text import Piece


async def test_pieces_joined_are_the_answer(make_engine):
    request = {"text": "tell me", "max_length": 20}
    async with make_engine() as engine:
        answer = await engine.process_request(request)
        stream = engine.stream(request)
        assert stream.answer() is None
        pieces = [piece async for piece in stream]
        assert all(type(piece) is Piece for piece in pieces)
        assert "".join(pieces) == answer["text"]
        assert [piece.token_id for piece in pieces] == answer["token_ids"]
        times = {"time_to_first_token_ms", "latency_ms", "cached", "cached_tokens"}
        assert {k: v for k, v in stream.answer().items() if k not in times} == {
            k: v for k, v in answer.items() if k not in times
        }
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_held_back_stop_string_is_never_shown(make_engine):
    async with make_engine() as engine:
        text = (await engine.process_request({"text": "tell me", "max_length": 20}))["text"]
        stop = text[8:12]
        pieces = [p async for p in engine.stream({"text": "tell me", "max_length": 20, "stop": stop})]
        assert "".join(pieces) == text[: text.index(stop)]


@pytest.mark.parametrize("how", ["async with", "aclosing", "aclose"])
async def test_leaving_early_frees_the_pages_at_once(make_engine, balanced, how):
    request = {"text": "tell me", "max_length": 400}
    async with make_engine() as engine:
        stream = engine.stream(request)
        if how == "async with":
            async with stream:
                await anext(stream)
        elif how == "aclosing":
            async with aclosing(stream):
                await anext(stream)
        else:
            await anext(stream)
            await stream.aclose()
            await stream.aclose()
        balanced(engine)
        assert engine.get_stats()["cancelled"] == 1
        with pytest.raises(StopAsyncIteration):
            await anext(stream)


async def test_a_dropped_stream_stops_the_work(make_engine, balanced, pulse):
    async with make_engine() as engine:
        steps = pulse(engine)
        async for _ in engine.stream({"text": "tell me", "max_length": 400}):
            break
        gc.collect()
        await steps.idle()
        balanced(engine)
        assert engine.get_stats()["cancelled"] == 1
        engine.stream({"text": "never asked for a piece"})


async def test_a_cancelled_reader_frees_the_pages(make_engine, balanced):
    async with make_engine() as engine:
        with anyio.CancelScope() as scope:
            async for _ in engine.stream({"text": "tell me", "max_length": 400}):
                scope.cancel()
        assert scope.cancelled_caught
        balanced(engine)


async def test_another_task_may_close_a_stream(make_engine, balanced):
    async with make_engine() as engine:
        stream = engine.stream({"text": "tell me", "max_length": 400})
        async with anyio.create_task_group() as tasks:
            async for index_piece in stream:
                assert isinstance(index_piece, str)
                tasks.start_soon(stream.aclose)
        balanced(engine)


async def test_pieces_nobody_fetches_wait(make_engine, pulse):
    request = {"text": "tell me", "max_length": 30}
    async with make_engine() as engine:
        text = (await engine.process_request(request))["text"]
        steps = pulse(engine)
        stream = engine.stream({**request, "deadline": 60})
        first = await anext(stream)
        await steps.idle()
        stream._expires = 0  # what was finished in time may be read at leisure
        assert first + "".join([piece async for piece in stream]) == text
