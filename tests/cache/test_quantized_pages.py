"""Quantized pages without a model: budgets, slices of ``process_kv``, states, and the collector."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kvhybrid import ConfigError, KVCache, KVCacheConfig, KVLayout, OutOfMemoryError
from kvhybrid._core import Batch
from kvhybrid.cache.codec import Codec
from kvhybrid.cache.collector import Collector
from kvhybrid.cache.quantized import record_bytes
from kvhybrid.cache.shares import divide
from kvhybrid.cache.states import PageStates
from kvhybrid.cache.step import Step

BLOCK, HEADS, WIDTH, LAYERS = 16, 2, 8, 2


def layout(**fields: object) -> KVLayout:
    sizes = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": WIDTH, "block_size": BLOCK}
    return KVLayout(**{**sizes, **fields})  # type: ignore[arg-type]


def config(bits: int = 8, pages: int = 24, **fields: object) -> KVCacheConfig:
    values = {"max_tokens": pages * BLOCK, "block_size": BLOCK, "use_quantization": True, **fields}
    return KVCacheConfig(**values, quantization_bits=bits, _env_file=None)


def roundtrip(pages: torch.Tensor, side: str, bits: int = 8) -> torch.Tensor:
    """What ``[heads, tokens, width]``, whole blocks, read as once they were quantized."""
    codec = Codec(bits)
    full = pages.unflatten(1, (-1, BLOCK)).transpose(0, 1).contiguous()
    size = (codec.key_bytes if side == "k" else codec.value_bytes)(WIDTH, BLOCK)
    records = torch.empty((len(full), HEADS, size), dtype=torch.uint8)
    (codec.quantize_keys if side == "k" else codec.quantize_values)(full, None, records, None)
    (codec.dequantize_keys if side == "k" else codec.dequantize_values)(records, None, full)
    return full.transpose(0, 1).flatten(1, 2)


def slices(tokens: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, HEADS, tokens, WIDTH), torch.randn(batch, HEADS, tokens, WIDTH)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("memory", [None, 0.05, 0.5])
def test_a_budget_is_divided_and_never_exceeded(bits: int, dtype: str, memory: float | None) -> None:
    shape, asked = layout(dtype=dtype), config(bits, 400, max_memory_mb=memory)
    full, (quantized,), _ = divide(asked, shape)
    page, record = shape.bytes_per_page, record_bytes(shape, bits)
    assert (full + quantized) * BLOCK <= 400 * BLOCK
    cache = KVCache(asked, layout=shape)
    held = [*cache.storage.keys, *cache.storage.values]
    for records in cache.storage.records:
        held += [*records.keys, *records.values]
    owned = sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)
    assert owned == full * page + quantized * record == cache.get_stats()["capacity_bytes"]
    assert memory is None or owned <= memory * 2**20
    assert cache.get_stats()["capacity_tokens"] == (full + quantized) * BLOCK
    # A quarter of the bytes, as near as whole pages come.
    assert abs(full * page - owned / 4) <= page
    # And no room is left for one more page of the kind that there are most of.
    at_most = (full + quantized) == 400 or owned + record > (memory or 0) * 2**20
    assert at_most


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pages": 4}, "max_tokens=64: use_quantization needs 5 pages of block_size=16, 80 tokens"),
        (
            {"max_memory_mb": 0.01},
            r"max_memory_mb=0.01: 10485 bytes, and use_quantization needs \d+: 4",
        ),
    ],
)
def test_a_budget_too_small_is_refused_with_what_is_needed(fields: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVCache(config(**fields), layout=layout())  # type: ignore[arg-type]


def test_pages_that_would_grow_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"quantization_bits=8: a page takes \d+ bytes in 8 bits, and \d+ before"
    ):
        KVCache(config(), layout=layout(dtype="bfloat16", head_dim=1, value_head_dim=1))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("batch", [1, 2])
def test_slices_read_back_quantized_where_they_are_cold_and_exactly_where_new(bits: int, batch: int) -> None:
    cache = KVCache(config(bits), layout=layout())
    stored = [slices(10 * BLOCK, batch) for _ in range(LAYERS)]
    for start in range(0, 10 * BLOCK, 8):
        for layer, (key, value) in enumerate(stored):
            span = slice(start, start + 8)
            found = cache.process_kv(key[:, :, span], value[:, :, span], layer_idx=layer)
    stats = cache.get_stats()
    cold = stats["quantized_tokens"] // batch
    assert cold % BLOCK == 0
    assert cold >= 5 * BLOCK
    del found
    for layer, (key, value) in enumerate(stored):
        new = slices(1, batch)
        keys, values, metadata = cache.process_kv(*new, layer_idx=layer)
        assert metadata["position"] == 10 * BLOCK
        for row in range(batch):
            for side, read, wrote in (("k", keys, key), ("v", values, value)):
                quantized = roundtrip(wrote[row], side, bits)
                for block in range(10):
                    span = slice(block * BLOCK, (block + 1) * BLOCK)
                    exact = torch.equal(read[row, :, span], wrote[row, :, span])
                    assert exact or torch.equal(read[row, :, span], quantized[:, span])
            assert torch.equal(keys[row, :, -1], new[0][row, :, -1])
    cache.pool.check()


def test_slices_cut_in_a_quantized_page_go_on_from_a_copy() -> None:
    cache = KVCache(config(), layout=layout())
    stored = [slices(8 * BLOCK) for _ in range(LAYERS)]
    for start in range(0, 8 * BLOCK, BLOCK):
        for layer, (key, value) in enumerate(stored):
            span = slice(start, start + BLOCK)
            cache.process_kv(key[:, :, span], value[:, :, span], layer_idx=layer)
    assert cache.get_stats()["quantized_tokens"] >= 3 * BLOCK
    cut = BLOCK + 5
    cache.truncate_kv(cut)
    for layer, (key, value) in enumerate(stored):
        new = slices(3)
        keys, values, metadata = cache.process_kv(*new, layer_idx=layer)
        assert metadata["position"] == cut
        assert torch.equal(keys[0, :, :cut], roundtrip(key[0], "k")[:, :cut])
        assert torch.equal(values[0, :, :cut], roundtrip(value[0], "v")[:, :cut])
        assert torch.equal(keys[:, :, cut:], new[0])
        assert torch.equal(values[:, :, cut:], new[1])
    cache.pool.check()


def test_what_not_every_layer_holds_yet_is_not_quantized() -> None:
    cache = KVCache(config(), layout=layout())
    room = cache.storage.num_full * BLOCK
    cache.process_kv(*slices(room), layer_idx=0)
    with pytest.raises(OutOfMemoryError):
        cache.process_kv(*slices(BLOCK), layer_idx=0)
    cache.process_kv(*slices(room), layer_idx=1)
    cache.process_kv(*slices(BLOCK), layer_idx=0)
    assert cache.get_stats()["demoted_pages"] == 1
    cache.pool.check()


def test_numbers_that_float16_cannot_scale_keep_full_precision() -> None:
    cache = KVCache(config(), layout=layout())
    stored = [slices(8 * BLOCK) for _ in range(LAYERS)]
    stored[1][0][:, :, :BLOCK, 0] = 1e8  # in the first block, of the second layer alone
    for start in range(0, 8 * BLOCK, BLOCK):
        for layer, (key, value) in enumerate(stored):
            span = slice(start, start + BLOCK)
            keys, values, _ = cache.process_kv(key[:, :, span], value[:, :, span], layer_idx=layer)
            assert torch.equal(keys[:, :, :BLOCK], key[:, :, :BLOCK])
            assert torch.equal(values[:, :, :BLOCK], value[:, :, :BLOCK])
    assert cache.get_stats()["refused_pages"] == 1
    assert cache.get_stats()["quantized_tokens"] >= 3 * BLOCK
    cache.pool.check()


def test_states_move_with_their_pages_and_stale_ones_are_dropped() -> None:
    states = PageStates(1000)
    states.put(1, (torch.ones(2),))
    states.put(9, (torch.zeros(2),))
    states.move([(1, 9), (2, 8)])
    assert 1 not in states
    (moved,) = states.get(9) or ()
    assert torch.equal(moved, torch.ones(2))
    states.move([(3, 9)])
    assert len(states) == states.used_bytes == 0


def test_the_collector_demotes_before_it_evicts() -> None:
    cache = KVCache(config(pages=40), layout=layout())
    pool, storage = cache.pool, cache.storage
    collector = Collector(pool, 0.8, storage)
    text = np.arange(storage.num_full * BLOCK, dtype=np.uint32)
    sequence = pool.open(text)
    step = Step.plan(storage, Batch(pool, [sequence]))
    for layer in range(LAYERS):
        step.write(layer, *slices(len(text)))
    step.commit()
    assert collector.collect() == 0  # all pages are pinned
    assert pool.num_free == storage.num_quantized
    sequence.close()
    assert collector.collect() == 0
    counters = pool.statistics()
    assert counters["evicted_pages"] == 0
    assert counters["demoted_pages"] == counters["num_pages"] - counters["num_quantized_pages"] - int(
        storage.num_full * 0.8 * 0.8
    )
    assert pool.match(text) == len(text)
    pool.check()


@pytest.mark.parametrize("bits", [4, 8])
def test_numbers_that_were_cut_off_set_the_step_of_what_stays(bits: int) -> None:
    """A page is quantized whole and once: how exact it is follows from all that it held then."""
    cache = KVCache(config(bits), layout=layout())
    keys, values = slices(8 * BLOCK)
    keys[:, :, 10:BLOCK] *= 1000
    values[:, :, 10:BLOCK] *= 1000
    for start in range(0, 8 * BLOCK, BLOCK):
        part = slice(start, start + BLOCK)
        for layer in range(LAYERS):
            cache.process_kv(keys[:, :, part], values[:, :, part], layer_idx=layer)
    session = cache._tensors._known["default", "default"]
    assert memoryview(session._rows[0].block_table()).cast("i")[0] >= cache.storage.num_full
    cache.truncate_kv(10)
    found, found_values, _ = cache.process_kv(keys[:, :, 10:11], values[:, :, 10:11], 10)
    # Keys: a channel over the tokens of the page. Half a step, and what float16 rounds of step and minimum.
    held = keys[:, :, :BLOCK]
    spread = held.amax(2, keepdim=True) - held.amin(2, keepdim=True)
    step = spread * (1 + 2**-9) / (2**bits - 1) + held.abs().amax(2, keepdim=True) * 2**-10
    off = (found[:, :, :10] - keys[:, :, :10]).abs()
    assert (off <= step / 2 + 1e-6).all()
    left = keys[:, :, :10]
    assert off.max() > (left.amax() - left.amin()) / (2**bits - 1)  # of what is left alone it would be less
    # Values: a token over its channels, so that others' numbers are nothing to it.
    spread = values[:, :, :10].amax(3, keepdim=True) - values[:, :, :10].amin(3, keepdim=True)
    step = spread * (1 + 2**-9) / (2**bits - 1) + values[:, :, :10].abs().amax(3, keepdim=True) * 2**-10
    assert ((found_values[:, :, :10] - values[:, :, :10]).abs() <= step / 2 + 1e-6).all()
