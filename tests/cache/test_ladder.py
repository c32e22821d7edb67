"""Pages that step down twice: from full precision to 8 bits, from there to 4, and then they leave."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhybrid import ConfigError, KVCache, KVCacheConfig, KVLayout
from kvhybrid._core import Batch
from kvhybrid.cache.codec import Codec
from kvhybrid.cache.demotion import waves
from kvhybrid.cache.quantized import record_bytes
from kvhybrid.cache.shares import LEAST, divide
from kvhybrid.cache.step import Step

BLOCK, HEADS, WIDTH, LAYERS = 16, 2, 8, 2


def layout(**fields: object) -> KVLayout:
    sizes = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": WIDTH, "block_size": BLOCK}
    return KVLayout(**{**sizes, **fields})  # type: ignore[arg-type]


def config(pages: int = 24, **fields: object) -> KVCacheConfig:
    values = {
        "max_tokens": pages * BLOCK,
        "block_size": BLOCK,
        "cache_strategy": "paged",
        "use_quantization": True,
        "quantization_bits": 4,
        **fields,
    }
    return KVCacheConfig(**values, _env_file=None)  # type: ignore[arg-type]


def slices(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(1, HEADS, tokens, WIDTH), torch.randn(1, HEADS, tokens, WIDTH)


def readings(block: torch.Tensor, side: str) -> list[torch.Tensor]:
    """What ``[heads, BLOCK, WIDTH]`` reads as in full precision, at 8 bits, and at 4 behind them."""
    found = [block]
    for bits in (8, 4):
        codec = Codec(bits)
        size = (codec.key_bytes if side == "k" else codec.value_bytes)(WIDTH, BLOCK)
        record, page = torch.empty((1, HEADS, size), dtype=torch.uint8), found[-1][None].contiguous()
        (codec.quantize_keys if side == "k" else codec.quantize_values)(page, None, record, None)
        page = torch.empty_like(page)
        (codec.dequantize_keys if side == "k" else codec.dequantize_values)(record, None, page)
        found.append(page[0])
    return found


def rungs(cache: KVCache, stored: list[tuple[torch.Tensor, torch.Tensor]], session: str = "a") -> list[int]:
    """How often each whole block of a session stepped down, by what is read of it in every layer."""
    tokens = stored[0][0].shape[2]
    found: list[int] = []
    reads = [
        cache.process_kv(*kv, 0, layer_idx=layer, session_id=session)[:2] for layer, kv in enumerate(stored)
    ]
    for start in range(0, tokens - tokens % BLOCK, BLOCK):
        span, seen = slice(start, start + BLOCK), set[int]()
        for read, wrote in zip(reads, stored, strict=True):
            for side, here, was in zip("kv", read, wrote, strict=True):
                same = [torch.equal(here[0, :, span], it) for it in readings(was[0, :, span], side)]
                assert any(same), f"block {start // BLOCK} is none of what it may be"
                seen.add(same.index(True))
        assert len(seen) == 1, f"block {start // BLOCK} is of several classes"
        found.append(seen.pop())
    return found


def fill(cache: KVCache, tokens: int, session: str = "a") -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Store so many tokens of a session, a block at a time, and return them."""
    stored = [slices(tokens) for _ in range(LAYERS)]
    for start in range(0, tokens, BLOCK):
        span = slice(start, start + BLOCK)
        for layer, (key, value) in enumerate(stored):
            cache.process_kv(key[:, :, span], value[:, :, span], layer_idx=layer, session_id=session)
    return stored


@settings(max_examples=60, deadline=None)
@given(
    pages=st.integers(1, 600),
    memory=st.none() | st.floats(0.005, 3),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    width=st.sampled_from([8, 64]),
)
def test_a_budget_is_divided_among_three_classes_and_never_exceeded(
    pages: int, memory: float | None, dtype: str, width: int
) -> None:
    shape, asked = layout(dtype=dtype, head_dim=width), config(pages, max_memory_mb=memory)
    sizes = [shape.bytes_per_page, record_bytes(shape, 8), record_bytes(shape, 4)]
    least = sum(n * size for n, size in zip(LEAST[2], sizes, strict=True))
    if pages < 7 or (memory is not None and int(memory * 2**20) < least):
        with pytest.raises(ConfigError, match="use_quantization needs"):
            divide(asked, shape)
        return
    full, quantized, _ = divide(asked, shape)
    counts = (full, *quantized)
    assert all(n >= few for n, few in zip(counts, LEAST[2], strict=True))
    assert sum(counts) <= pages
    held = [n * size for n, size in zip(counts, sizes, strict=True)]
    assert memory is None or sum(held) <= memory * 2**20
    # No room is left for one more page of the kind that there are most of.
    assert sum(counts) == pages or sum(held) + sizes[-1] > (memory or 0) * 2**20
    if counts[0] > LEAST[2][0] and counts[1] > LEAST[2][1]:
        for own, part, size in zip(held, (0.25, 0.25, 0.5), sizes, strict=True):
            assert abs(own - part * sum(held)) <= 2 * sizes[0] + size


def test_a_long_session_has_its_newest_blocks_whole_and_its_oldest_at_4_bits() -> None:
    cache = KVCache(config(), layout=layout())
    storage = cache.storage
    stored = fill(cache, 20 * BLOCK)
    found = rungs(cache, stored)
    full, eight, four = storage.num_full, *(records.num_pages for records in storage.records)
    assert found == sorted(found, reverse=True)
    assert found.count(0) == full
    assert found.count(1) == eight
    assert found.count(2) == 20 - full - eight <= four
    stats = cache.get_stats()
    assert (stats["int8_pages"], stats["int4_pages"]) == (eight, found.count(2))
    assert stats["int8_bytes"] == eight * storage.records[0].record_bytes
    assert stats["int4_bytes"] == found.count(2) * storage.records[1].record_bytes
    assert stats["quantized_bytes"] == stats["int8_bytes"] + stats["int4_bytes"]
    assert stats["used_bytes"] == stats["full_bytes"] + stats["quantized_bytes"] <= stats["capacity_bytes"]
    assert stats["demoted_to_int4_pages"] == found.count(2)
    assert stats["demoted_to_int8_pages"] == found.count(2) + eight
    assert stats["demoted_pages"] == stats["demoted_to_int8_pages"] + stats["demoted_to_int4_pages"]
    cache.pool.check()


@pytest.mark.parametrize(("strategy", "bits", "expected"), [("lru", 4, {0, 1}), ("adaptive", 4, {0, 1, 2})])
def test_lru_keeps_one_class_and_adaptive_has_the_ladder(
    strategy: str, bits: int, expected: set[int]
) -> None:
    cache = KVCache(config(cache_strategy=strategy, quantization_bits=bits), layout=layout())
    assert len(cache.storage.records) + 1 == len(expected)
    assert [records.bits for records in cache.storage.records] == [8, 4][-len(expected) + 1 :]
    fill(cache, 20 * BLOCK)
    stats = cache.get_stats()
    assert (stats["int8_pages"] > 0) == (2 in expected)
    assert stats["int4_pages"] > 0


def test_without_codecs_paged_evicts_whole_pages_and_what_is_read_is_what_was_written() -> None:
    cache = KVCache(
        KVCacheConfig(max_tokens=8 * BLOCK, block_size=BLOCK, cache_strategy="paged"), layout=layout()
    )
    for start in range(3):
        text = np.arange(100 * start, 100 * start + 4 * BLOCK, dtype=np.uint32)
        sequence = cache.pool.open(text)
        step = Step.plan(cache.storage, Batch(cache.pool, [sequence]))
        for layer in range(LAYERS):
            step.write(layer, *slices(len(text)))
        step.commit()
        sequence.close()
    stats = cache.get_stats()
    assert (stats["demoted_pages"], stats["quantized_bits"], stats["evicted_pages"]) == (0, 0, 4)
    stored = fill(cache, 4 * BLOCK)
    assert rungs(cache, stored) == [0, 0, 0, 0]


def test_a_step_down_that_fails_half_way_leaves_every_page_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = KVCache(config(), layout=layout())
    stored = fill(cache, 20 * BLOCK)
    storage, before, calls = cache.storage, rungs(cache, stored), list[int]()
    quantize = storage.quantize

    def fail_later(pairs: list[tuple[int, int]]) -> list[bool]:
        calls.append(len(pairs))
        if len(calls) == 2:
            raise RuntimeError("the codec fails")
        return quantize(pairs)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "quantize", fail_later)
        with pytest.raises(RuntimeError, match="the codec fails"):
            cache.process_kv(*slices(1), layer_idx=0, session_id="a")
    assert calls == [1, 1]
    cache.pool.check()
    assert rungs(cache, stored) == before
    cache.process_kv(*slices(1), layer_idx=0, session_id="a")
    assert rungs(cache, stored) != before


def test_what_4_bits_cannot_scale_stays_at_8() -> None:
    cache = KVCache(config(), layout=layout())
    stored = [slices(20 * BLOCK) for _ in range(LAYERS)]
    # A range that float16 holds the 255th part of, but not the 15th.
    stored[1][0][:, :, 5, 3] = 2e6
    for start in range(0, 20 * BLOCK, BLOCK):
        span = slice(start, start + BLOCK)
        for layer, (key, value) in enumerate(stored):
            cache.process_kv(key[:, :, span], value[:, :, span], layer_idx=layer, session_id="a")
    found = rungs(cache, stored)
    assert found[:2] == [1, 2]
    assert cache.get_stats()["refused_pages"] == 1
    cache.pool.check()


def test_demotions_are_written_in_runs_that_name_no_page_twice() -> None:
    pairs = [(8, 20), (9, 21), (1, 8), (2, 9), (3, 10)]
    assert [list(run) for run in waves(pairs)] == [pairs[:2], pairs[2:]]
    assert list(waves([])) == []
    assert [list(run) for run in waves([(1, 8), (8, 20)])] == [[(1, 8)], [(8, 20)]]
