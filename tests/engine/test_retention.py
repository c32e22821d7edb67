"""What the engine says of the time after an answer, and of requests that wait."""

from functools import partial

import anyio
import anyio.lowlevel
import numpy as np
import pytest

from kvhybrid import CapacityError, InvalidRequestError, KVCacheConfig, KVEngine, UnsupportedError
from kvhybrid.model.tenancy import Tenancy

A, B, C = (letter * 40 for letter in "ABC")


def cached(engine, tokens):
    return engine.cache.explain(np.asarray(tokens, np.int32)).cached


def evict_down_to(engine, tokens, count):
    """Evict page by page until no more of a text is cached."""
    while cached(engine, tokens) > count:
        assert engine.cache.pool.evict(1) == 1


def ids(engine, text):
    return engine._door.encode(text, special=True)


async def ask(engine, text, **fields):
    return await engine.process_request({"text": text, "max_length": 4, **fields})


async def test_what_a_waiting_request_needs_stays_until_it_is_cancelled(make_engine, llama, gate, balanced):
    async with make_engine(num_workers=1) as engine:
        await ask(engine, A)
        held = gate(llama)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, engine, B)
            await held.reached()
            with anyio.CancelScope() as scope:

                async def wait_and_see():
                    while not engine.get_stats()["hinted_requests"]:
                        await anyio.lowlevel.checkpoint()
                    engine.cache.clear()
                    assert cached(engine, ids(engine, A)) == 40
                    scope.cancel()

                tasks.start_soon(wait_and_see)
                await ask(engine, A + "more")
            assert scope.cancelled_caught
            assert engine.get_stats()["hinted_requests"] == 0
            engine.cache.clear()
            assert cached(engine, ids(engine, A)) == 0
            held.open()
        balanced(engine)


async def test_hints_end_when_their_requests_run_or_the_engine_is_left(make_engine, balanced):
    async with make_engine(num_workers=2) as engine:
        await ask(engine, A)
        async with anyio.create_task_group() as tasks:
            for number in range(12):
                tasks.start_soon(ask, engine, A + str(number))
        assert engine.get_stats()["hinted_requests"] == 0
        balanced(engine)


async def test_hints_are_given_up_for_what_runs(make_engine, balanced):
    async with make_engine(num_workers=2, max_tokens=128) as engine:
        for text in "ABCD":
            await ask(engine, text * 24)
        async with anyio.create_task_group() as tasks:
            for text in "EF":
                tasks.start_soon(ask, engine, text * 50)
            for text in "ABCD":
                tasks.start_soon(ask, engine, text * 24 + "more")
        assert engine.get_stats()["completed"] == 10
        assert engine.get_stats()["hinted_requests"] == 0
        balanced(engine)


async def test_hints_hold_a_quarter_of_the_pages_at_most(make_engine):
    async with make_engine(max_tokens=256) as engine:
        for text in (A, B, C):
            await ask(engine, text)
        hints, namespace = engine.cache.hints, Tenancy(engine._namespaces, "default").latest()
        for key, text in enumerate((A, B, C)):
            hints.hold(key, ids(engine, text), namespace)
        assert engine.get_stats()["hinted_requests"] == 1
        assert engine.cache.pool.statistics()["pinned_pages"] == 5
        assert hints.make_room()
        assert not hints.make_room()
        assert engine.get_stats()["hints_given_up"] == 1


def chat(text):
    return [{"role": "user", "content": text}]


def held(session):
    return np.frombuffer(session.tokens(), np.uint32)


async def test_a_dropped_conversation_leaves_first_but_for_what_others_had_before(make_engine):
    async with make_engine() as engine:
        await engine.process_request({"messages": chat(A), "max_length": 1})
        session = engine.session("a")
        for turn in (A, "two", "three"):
            await session.send(turn, max_length=4)
        await ask(engine, B)
        assert engine.drop_session("a")
        # The block in which others' part ends is theirs, too.
        evict_down_to(engine, held(session), 48)
        stats = engine.get_stats()
        assert stats["evicted_ttl_pages"] == stats["evicted_pages"] > 0
        assert cached(engine, ids(engine, B)) == 40
        evict_down_to(engine, ids(engine, B), 0)
        assert cached(engine, held(session)) >= 40, "the beginning is others', and in no hurry"


async def test_a_conversation_that_is_dropped_during_a_turn_leaves_first_all_the_same(
    make_engine, llama, gate
):
    async with make_engine() as engine:
        session = engine.session("a")
        session.retain(priority=50)
        await session.send(A, max_length=4)
        turn = gate(llama)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(session.send, "two", max_length=4))
            await turn.reached()
            assert engine.drop_session("a")
            turn.open()
        assert session.num_turns == 2
        await ask(engine, B)
        evict_down_to(engine, held(session), 0)
        assert cached(engine, ids(engine, B)) == 40
        stats = engine.get_stats()
        assert stats["evicted_ttl_pages"] == stats["evicted_pages"] > 0


async def test_a_conversation_that_is_dropped_during_a_turn_that_fails_leaves_first(make_engine, llama, gate):
    async with make_engine() as engine:
        await ask(engine, B)
        session = engine.session("a")
        session.retain(priority=50)
        await session.send(A, max_length=4)
        turn = gate(llama)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(session.send, "two", max_length=4))
            await turn.reached()
            assert engine.drop_session("a")
            tasks.cancel_scope.cancel()
            turn.open()
        assert session.num_turns == 1
        evict_down_to(engine, held(session), 0)
        assert cached(engine, ids(engine, B)) == 40


async def test_a_conversation_has_time_to_live_from_its_last_turn_on(make_engine):
    async with make_engine() as engine:
        pool = engine.cache.pool
        pool.set_time(0)
        session = engine.session("a")
        session.retain(ttl_s=60)
        await session.send(A, max_length=4)
        pool.set_time(50_000_000)
        await session.send("two", max_length=4)
        await ask(engine, B)
        pool.set_time(100_000_000)
        evict_down_to(engine, ids(engine, B), 0)
        tokens = held(session)
        assert cached(engine, tokens) == len(tokens) - 1
        await ask(engine, B)
        pool.set_time(111_000_000)
        evict_down_to(engine, tokens, 0)
        assert cached(engine, ids(engine, B)) == 40
        assert "(ttl)" in str(engine.cache.explain(tokens))


async def test_a_pinned_conversation_stays_and_grows(make_engine, balanced):
    async with make_engine() as engine:
        session = engine.session("a")
        assert session.pin() == 0
        await session.send(A, max_length=4)
        await session.send("two", max_length=4)
        tokens = held(session)
        engine.cache.clear()
        assert cached(engine, tokens) == len(tokens) - 1
        assert engine.get_stats()["user_pinned_pages"] >= len(tokens) // 8
        session.unpin()
        assert not session.is_pinned
        engine.cache.clear()
        assert cached(engine, tokens) == 0
        session.pin()
        assert (await session.send("three", max_length=4))["cached_tokens"] == 0
        engine.drop_session("a")
        balanced(engine)


async def test_pins_leave_room_to_run_and_say_so(make_engine):
    async with make_engine(max_tokens=256) as engine:
        session = engine.session("a")
        await session.send("A" * 150, max_length=4)
        with pytest.raises(CapacityError, match="needs 20 pages to pin, 0 pinned of at most 16 of 32"):
            session.pin()
        assert not session.is_pinned
        assert len((await ask(engine, B))["token_ids"]) == 4


@pytest.mark.parametrize("expects", ["nothing", "user", "tool_result"])
async def test_what_is_expected_says_who_leaves_first(make_engine, expects):
    async with make_engine() as engine:
        pool = engine.cache.pool
        pool.set_time(0)
        await ask(engine, A)
        await ask(engine, B, expects=expects)
        await ask(engine, C)
        first = {"nothing": B, "user": A, "tool_result": A}[expects]
        evict_down_to(engine, ids(engine, first), 0)
        others = [text for text in (A, B, C) if text is not first]
        assert [cached(engine, ids(engine, text)) for text in others] == [40, 40]
        second = {"nothing": A, "user": B, "tool_result": C}[expects]
        evict_down_to(engine, ids(engine, second), 0)
        pool.set_time(200_000_000)
        await ask(engine, "D" * 40)
        evict_down_to(engine, ids(engine, next(text for text in others if text is not second)), 0)
        assert cached(engine, ids(engine, "D" * 40)) == 40, "what lapsed is as any other: older"
        assert (engine.get_stats()["evicted_ttl_pages"] > 0) == (expects == "nothing")


async def test_a_request_says_how_long_its_text_is_wanted(make_engine):
    async with make_engine() as engine:
        engine.cache.pool.set_time(0)
        await ask(engine, A, retention={"priority": 1})
        await ask(engine, B, retention={"priority": 1, "ttl_s": 60}, expects="tool_result")
        await ask(engine, C, retention={})
        for text, others in ((C, [40, 40]), (A, [0, 40])):
            evict_down_to(engine, ids(engine, text), 0)
            assert [cached(engine, ids(engine, text)) for text in (A, B)] == others
        await ask(engine, C)
        engine.cache.pool.set_time(61_000_000)
        evict_down_to(engine, ids(engine, B), 0)
        assert cached(engine, ids(engine, C)) == 40


@pytest.mark.parametrize(
    "wrong",
    [{"priority": 101}, {"ttl_s": -1}, {"pin": True}, {"priority": "high"}, 5],
    ids=str,
)
async def test_a_retention_that_cannot_be_meant_is_refused(make_engine, wrong):
    async with make_engine() as engine:
        with pytest.raises(InvalidRequestError, match=r"retention=.*must be a mapping of priority"):
            await ask(engine, A, retention=wrong)
        with pytest.raises(
            InvalidRequestError, match="expects='soon': must be one of tool_result, user, nothing"
        ):
            await ask(engine, A, expects="soon")
        with pytest.raises(InvalidRequestError, match="priority=101"):
            engine.session("a").retain(priority=101)


async def test_a_preempted_request_is_retained_once_it_is_done(make_engine, balanced):
    async with make_engine(num_workers=4, max_tokens=128) as engine:
        async with anyio.create_task_group() as tasks:
            for text in "ABCD":
                tasks.start_soon(ask, engine, text * 60)
        assert engine.get_stats()["completed"] == 4
        balanced(engine)


async def test_the_engine_says_who_rules_and_why(llama, tokenizer):
    config = KVCacheConfig(max_tokens=2048, block_size=8, cache_strategy="adaptive")
    async with KVEngine(llama, config, tokenizer=tokenizer) as engine:
        await ask(engine, A)
        stats = engine.get_stats()
        assert stats["learned_order_rules"] in (0, 1)
        assert {"shadow_hit_rate_lru", "shadow_hit_rate_survival", "rule_changes", "lessons"} <= stats.keys()


async def test_a_compressed_conversation_cannot_be_pinned(llama, tokenizer):
    config = KVCacheConfig(max_tokens=2048, block_size=8, use_compression=True, compression_ratio=0.5)
    async with KVEngine(llama, config, tokenizer=tokenizer) as engine:
        with pytest.raises(UnsupportedError, match="compressed cannot be pinned"):
            engine.session("a").pin()
