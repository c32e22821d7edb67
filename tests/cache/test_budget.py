"""Budgets: what the pages own never exceeds them, and is paid for as it is used."""

import gc
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvhybrid import ConfigError, KVCache, KVCacheConfig, KVLayout, OutOfMemoryError
from kvhybrid.cache import budget, memory
from kvhybrid.cache.memory import Buffers, device_bytes, is_out_of_memory
from kvhybrid.cache.pages import PageStorage
from kvhybrid.layout import LayerShape

MIB = 2**20

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def layout_of(**changes):
    return KVLayout(**{"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "block_size": 16, **changes})


def make(layout, **values):
    return KVCache(KVCacheConfig(block_size=layout.block_size, _env_file=None, **values), layout=layout)


def owned_bytes(cache):
    """What the tensors of the pages really own, by their storages and not by our arithmetic."""
    tensors = (*cache.storage.keys, *cache.storage.values)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


shapes = st.none() | st.builds(
    LayerShape, num_kv_heads=st.integers(1, 4), head_dim=st.integers(1, 9), value_head_dim=st.integers(1, 9)
)


@given(
    layers=st.lists(shapes, min_size=1, max_size=4).filter(any),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    block_size=st.sampled_from([1, 4, 64]),
    max_tokens=st.integers(64, 5000),
    pages=st.floats(1, 40),
)
@settings(max_examples=60)
def test_no_byte_and_no_token_above_either_budget(layers, dtype, block_size, max_tokens, pages):
    layout = KVLayout.of_layers(layers, dtype=dtype, block_size=block_size)
    limit = pages * layout.bytes_per_page / MIB
    cache = make(layout, max_tokens=max_tokens, max_memory_mb=limit)
    stats = cache.get_stats()
    assert owned_bytes(cache) == stats["capacity_bytes"] == cache.storage.nbytes
    assert owned_bytes(cache) <= limit * MIB
    assert stats["capacity_tokens"] <= max_tokens
    # And not less than it might be: one page more would break one of the two.
    page, tokens = layout.bytes_per_page, layout.block_size
    assert owned_bytes(cache) + page > limit * MIB or stats["capacity_tokens"] + tokens > max_tokens


def test_used_bytes_stay_below_the_cap_whatever_comes():
    layout = layout_of()
    cache = make(layout, max_memory_mb=10 * layout.bytes_per_page / MIB)
    for first in range(40):
        new = torch.randn(1, 2, 16 * (first % 4 + 1), 8)
        try:
            cache.process_kv(new, new, session_id=str(first % 5))
        except OutOfMemoryError:
            cache.drop_session(str(first % 3))
        stats = cache.get_stats()
        assert stats["used_bytes"] <= stats["capacity_bytes"] == owned_bytes(cache)


def test_a_budget_that_no_device_could_hold_is_refused(monkeypatch):
    layout = layout_of()
    monkeypatch.setattr(budget, "device_bytes", lambda device: 10 * layout.bytes_per_page)
    assert make(layout, max_tokens=160).pool.num_pages == 10
    with pytest.raises(
        ConfigError,
        match=r"max_tokens=8000000, max_memory_mb=None: the pages take 1953 MiB on cpu, which has 0",
    ):
        make(layout, max_tokens=8_000_000)


def test_states_need_room_on_the_device_beside_the_pages(monkeypatch):
    shape = LayerShape(num_kv_heads=2, head_dim=8, value_head_dim=8)
    layout = KVLayout.of_layers([shape, None], block_size=16, state_bytes=100)
    monkeypatch.setattr(budget, "device_bytes", lambda device: 40 * layout.bytes_per_page)
    assert make(layout, max_tokens=320).storage.states.capacity_bytes == 20 * layout.bytes_per_page
    with pytest.raises(ConfigError, match="the pages and states take"):
        make(layout, max_tokens=336)


def test_layers_on_several_devices_need_room_on_each(monkeypatch):
    layout, asked = layout_of(num_layers=3), []
    page = layout.bytes_per_page // 3
    monkeypatch.setattr(budget, "device_bytes", lambda d: asked.append(d) or 10 * page)
    devices = [torch.device("cpu"), torch.device("meta"), torch.device("meta")]
    config = KVCacheConfig(max_tokens=80, block_size=16, _env_file=None)
    KVCache(config, layout=layout, devices=devices)
    assert [device.type for device in asked] == ["cpu", "meta"]
    config = KVCacheConfig(max_tokens=96, block_size=16, _env_file=None)
    with pytest.raises(ConfigError, match="on meta, which has"):
        KVCache(config, layout=layout, devices=devices)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_device_that_does_not_give_its_memory_is_out_of_it(monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(PageStorage, "_empty", refuse)
    with pytest.raises(
        OutOfMemoryError, match=r"max_tokens=8192, .* take 8 MiB, and there is no room"
    ) as caught:
        make(layout_of(num_kv_heads=8))
    assert caught.value.__cause__ is error


def test_other_failures_of_a_device_keep_their_name(monkeypatch):
    def refuse(*args, **kwargs):
        raise RuntimeError("no such device")

    monkeypatch.setattr(PageStorage, "_empty", refuse)
    with pytest.raises(RuntimeError, match="no such device"):
        make(layout_of())


def test_running_out_of_the_hosts_memory_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.int8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough of something else"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    physical = device_bytes(torch.device("cpu"))
    assert physical is None or physical > MIB
    assert device_bytes(torch.device("meta")) is None
    (tmp_path / "old").write_text("9223372036854771712\n")
    (tmp_path / "none").write_text("max\n")
    paths = tuple(tmp_path / name for name in ("none", "old", "missing"))
    monkeypatch.setattr(memory, "CONTROL_GROUPS", paths)
    assert device_bytes(torch.device("cpu")) in (physical, 9223372036854771712)
    (tmp_path / "none").write_text(f"{MIB}\n")
    assert device_bytes(torch.device("cpu")) == MIB


def test_buffers_count_while_they_live():
    buffers = Buffers()
    held = [buffers.track(torch.empty(2**n)) for n in range(5)]
    assert buffers.num_bytes == 4 * 31
    view = held[4][:2]
    del held[4]
    gc.collect()
    assert buffers.num_bytes == 4 * 31, "a view keeps all of it"
    del view, held[2:]
    gc.collect()
    assert buffers.num_bytes == 4 * 3
    held.clear()
    assert buffers.num_bytes == 0


GIANT = """
import os, torch
from kvhybrid import KVCache, KVCacheConfig, KVLayout
from kvhybrid.cache.memory import device_bytes

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def virtual():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")

# What torch then fills, it touches.
torch.use_deterministic_algorithms(True)
layout = KVLayout(num_layers=4, num_kv_heads=8, head_dim=128, dtype="float16", block_size=64)
budget = min(64 * 2**30, device_bytes(torch.device("cpu")) // 2)
before, mapped = resident(), virtual()
config = KVCacheConfig(max_tokens=2**31 - 1, max_memory_mb=budget / 2**20, _env_file=None)
cache = KVCache(config, layout=layout)
made = resident()
assert virtual() - mapped > 0.9 * budget, "nothing was set aside"
new = torch.ones(1, 8, 2048, 128, dtype=torch.float16)
for layer in range(4):
    cache.process_kv(new, new, layer_idx=layer)
used = cache.get_stats()["used_bytes"]
print(budget, made - before, resident() - made, used)
"""


@on_linux
def test_memory_is_paid_for_as_it_is_used_so_that_another_process_finds_some():
    done = subprocess.run(
        [sys.executable, "-c", GIANT], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    total, made, written, used = map(int, done.stdout.split())
    assert total >= 256 * MIB
    # Books of the pool, 64 bytes a page or so, and no page.
    assert made < total / 200 + 32 * MIB
    assert used == 2048 * 4 * 8 * 256 * 2
    # The slice itself and what torch sets aside come on top; huge pages round up, a tensor at a time.
    assert 0.9 * used < written < 3 * used + 64 * MIB
