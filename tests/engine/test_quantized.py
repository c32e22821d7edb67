"""Engines whose cold pages are quantized: more is cached than fits in full precision, and never too much."""

import anyio
import numpy as np
import pytest
from families import prompt

from kvhybrid import KVCacheConfig, KVEngine

BLOCK = 16


def engine_of(model, tokenizer, pages, **fields):
    config = KVCacheConfig(
        max_tokens=pages * BLOCK, block_size=BLOCK, use_quantization=True, quantization_bits=8, **fields
    )
    return KVEngine(model, config, tokenizer=tokenizer)


async def test_a_prompt_longer_than_full_precision_holds_is_answered(llama, tokenizer, own_words, balanced):
    ids = prompt(400)[0].tolist()
    expected = own_words(llama, ids, 12)
    async with engine_of(llama, tokenizer, 40) as engine:
        assert engine.cache.storage.num_full * BLOCK < 100
        answer = await engine.process_request({"token_ids": ids, "max_length": 12})
        assert answer["token_ids"] == expected
        again = await engine.process_request({"token_ids": ids, "max_length": 12})
        assert again["token_ids"] == expected
        assert again["cached_tokens"] >= 390
    balanced(engine)


@pytest.mark.parametrize("enable_gc", [False, True])
async def test_requests_under_pressure_all_end_within_the_budget(llama, tokenizer, balanced, enable_gc):
    fields = {"enable_gc": True, "gc_threshold": 0.8} if enable_gc else {}
    async with engine_of(llama, tokenizer, 48, **fields) as engine:
        found, used = {}, []

        async def ask(index):
            ids = prompt(60 + 20 * index, seed=index % 4)[0].tolist()
            found[index] = await engine.process_request({"token_ids": ids, "max_length": 10})
            stats = engine.cache.get_stats()
            used.append(stats["used_bytes"] <= stats["capacity_bytes"])

        async with anyio.create_task_group() as tasks:
            for index in range(10):
                tasks.start_soon(ask, index)
        assert {answer["completion_tokens"] for answer in found.values()} == {10}
        assert all(used)
        stats = engine.cache.get_stats()
        assert stats["demoted_pages"] > 0
        assert stats["num_pages"] * BLOCK <= 48 * BLOCK
    balanced(engine)


@pytest.mark.parametrize("share", [0.5, 0.75, 0.9])
async def test_pins_leave_room_for_a_step_whatever_share_they_may_take(llama, tokenizer, own_words, share):
    ids = [prompt(400, seed=seed)[0].tolist() for seed in range(3)]
    expected = [own_words(llama, each, 8) for each in ids[:2]]
    async with engine_of(llama, tokenizer, 60, max_pinned_share=share) as engine:
        most = int(engine.cache.storage.num_full * share)
        short = ids[2][: most * BLOCK]
        await engine.process_request({"token_ids": short, "max_length": 1})
        pin = engine.cache.pin(np.array(short, np.int32)[: (most - 1) * BLOCK])
        for each, answer in zip(ids, expected, strict=False):
            found = await engine.process_request({"token_ids": each, "max_length": 8})
            assert found["token_ids"] == answer
        assert pin.is_held
