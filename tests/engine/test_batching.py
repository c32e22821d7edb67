"""Who runs with whom: joining, leaving, order, making room; and the loop is free meanwhile."""

import threading

import anyio
import anyio.lowlevel
import pytest
from families import make_model, prompt

from kvhybrid import CapacityError, ConfigError
from kvhybrid.engine.text import Detokenizer


async def gather(engine, requests):
    found = [None] * len(requests)

    async def ask(index):
        found[index] = await engine.process_request(requests[index])

    async with anyio.create_task_group() as tasks:
        for index in range(len(requests)):
            tasks.start_soon(ask, index)
    return found


async def test_requests_join_and_leave_a_running_batch(make_engine, llama, own_words):
    prompts = [prompt(11 + i, seed=i)[0].tolist() for i in range(4)]
    lengths = [40, 3, 9, 5]
    expected = [own_words(llama, ids, n) for ids, n in zip(prompts, lengths, strict=True)]
    async with make_engine() as engine:
        stream = engine.stream({"token_ids": prompts[0], "max_length": lengths[0]})
        found = [(await anext(stream)).token_id]
        for ids, length, words in zip(prompts[1:], lengths[1:], expected[1:], strict=True):
            answer = await engine.process_request({"token_ids": ids, "max_length": length})
            assert answer["token_ids"] == words
        found += [piece.token_id async for piece in stream]
        # Stepping alone they would have taken one step a token each.
        assert engine.get_stats()["steps"] < sum(lengths)
    assert found == expected[0]


@pytest.mark.parametrize(
    ("family", "implementation"), [("llama", "sdpa"), ("gpt2", "sdpa"), ("llama", "eager")]
)
async def test_preempted_requests_say_the_same(make_engine, own_words, balanced, family, implementation):
    model = make_model(family)
    model.set_attn_implementation(implementation)
    prompts = [prompt(21 + i, seed=i)[0].tolist() for i in range(5)]
    expected = [own_words(model, ids, 30) for ids in prompts]
    async with make_engine(model, max_tokens=96) as engine:
        found = await gather(engine, [{"token_ids": ids, "max_length": 30} for ids in prompts])
        stats = engine.get_stats()
    assert [answer["token_ids"] for answer in found] == expected
    assert stats["preemptions"] > 0
    assert stats["completed"] == 5
    balanced(engine)


async def test_a_preempted_draw_goes_on_with_its_own_numbers(make_engine):
    requests = [
        {"text": f"draw {i}", "max_length": 50, "temperature": 1.5, "seed": i, "session_id": str(i)}
        for i in range(3)
    ]
    async with make_engine() as engine:
        expected = await gather(engine, requests)
    async with make_engine(max_tokens=96) as engine:
        found = await gather(engine, requests)
        assert engine.get_stats()["preemptions"] > 0
    assert [answer["text"] for answer in found] == [answer["text"] for answer in expected]


async def test_a_request_of_the_whole_pool_runs_though_it_reuses_part_of_a_page(
    make_engine, llama, own_words
):
    ids = prompt(60)[0].tolist()
    other = [*ids[:20], *prompt(40, seed=1)[0].tolist()]
    expected = own_words(llama, other, 4)
    async with make_engine(max_tokens=64) as engine:
        await engine.process_request({"token_ids": ids, "max_length": 4})
        answer = await engine.process_request({"token_ids": other, "max_length": 4})
    assert answer["token_ids"] == expected


async def test_pages_held_by_others_fail_the_last_request_with_the_numbers(make_engine, balanced):
    import numpy as np

    from kvhybrid._core import Batch

    async with make_engine(max_tokens=64) as engine:
        pool = engine.cache.pool
        held = pool.open(np.arange(40, dtype=np.uint32), 99)
        plan = Batch(pool, [held]).plan()
        plan.commit()
        with pytest.raises(CapacityError, match="page"):
            await engine.process_request({"token_ids": [5] * 30, "max_length": 4})
        assert await engine.process_request({"token_ids": [5] * 10, "max_length": 4})
        held.close()
        assert await engine.process_request({"token_ids": [5] * 30, "max_length": 4})
        balanced(engine)


async def test_priority_then_deadline_then_arrival(make_engine, llama, gate):
    order = []
    waiting = [
        ("late", {}),
        ("low", {"priority": -1}),
        ("soon", {"deadline": 60}),
        ("sooner", {"deadline": 50}),
        ("high", {"priority": 1}),
    ]
    async with make_engine(num_workers=1) as engine:
        held = gate(llama)

        async def ask(name, **options):
            await engine.process_request({"text": "go", "max_length": 1, **options})
            order.append(name)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ask, "first")
            await held.reached()
            for count, (name, options) in enumerate(waiting, 1):
                tasks.start_soon(lambda name=name, options=options: ask(name, **options))
                while len(engine._scheduler) < count:
                    await anyio.lowlevel.checkpoint()
            held.open()
    assert order == ["first", "high", "sooner", "soon", "late", "low"]


async def test_no_more_run_at_once_than_workers(make_engine, llama, monkeypatch):
    sizes = []
    async with make_engine(num_workers=3) as engine:
        run = engine._runner.run

        def watched(step, tokens, keys, gaps):
            sizes.append(len(keys))
            return run(step, tokens, keys, gaps)

        monkeypatch.setattr(engine._runner, "run", watched)
        requests = [{"text": f"number {i}", "max_length": 6} for i in range(9)]
        await gather(engine, requests)
        assert max(sizes) == 3
        engine.num_workers = 5
        sizes.clear()
        await gather(engine, requests)
        assert max(sizes) == 5
        for wrong in (0, 129, True, 2.0):
            with pytest.raises(ConfigError, match="num_workers="):
                engine.num_workers = wrong


async def test_the_loop_turns_while_a_step_runs(make_engine, llama, gate, monkeypatch):
    """The forward pass and the tokenizer wait for the loop to turn: were it blocked, they would fail."""
    here = threading.get_ident()
    async with make_engine() as engine:
        held = gate(llama)
        turned, threads = threading.Event(), set()
        encode, push = engine._door.encode, Detokenizer.push

        def held_encode(text, **options):
            threads.add(threading.get_ident())
            assert turned.wait(30)
            return encode(text, **options)

        def watched_push(*args, **kwargs):
            threads.add(threading.get_ident())
            return push(*args, **kwargs)

        monkeypatch.setattr(engine._door, "encode", held_encode)
        monkeypatch.setattr(Detokenizer, "push", watched_push)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(engine.process_request, {"text": "hello", "max_length": 3})
            for _ in range(100):
                await anyio.lowlevel.checkpoint()
            turned.set()
            await held.reached()
            for _ in range(100):
                await anyio.lowlevel.checkpoint()
            held.open()
        assert here not in threads | held.threads
        assert len(held.threads) == 1
