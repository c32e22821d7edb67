"""Whoever leaves first, answers are the same; and the engine says who rules."""

from __future__ import annotations

import pytest

from kvhybrid import KVCacheConfig, KVEngine

OPENINGS = (
    "To be, or not to be, that is the question",
    "Friends, Romans, countrymen",
    "Once more unto the breach",
)


async def answers(strategy: str) -> tuple[list[str], dict[str, int | float]]:
    config = KVCacheConfig(cache_strategy=strategy, block_size=16, max_tokens=160)
    async with KVEngine(config=config) as engine:
        texts = []
        for turn in range(12):
            text = OPENINGS[turn % 3] + " and so on" * (turn // 3 + 1)
            answer = await engine.process_request({"text": text, "max_length": 3, "temperature": 0})
            texts.append(answer["text"])
        stats = engine.get_stats()
        engine.cache.pool.check()
    return texts, stats


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_both_strategies_answer_alike_under_pressure(anyio_backend):
    recent, _ = await answers("lru")
    adaptive, stats = await answers("adaptive")
    assert adaptive == recent
    assert stats["evicted_pages"] > 0
    assert stats["learned_order_rules"] in (0, 1)
    assert stats["ghosts"] > 0
