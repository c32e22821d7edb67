"""Background eviction: from the threshold down to the low watermark, by a thread that nobody waits for."""

import gc
import os
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvhybrid import CapacityError, KVCache, KVCacheConfig, KVLayout
from kvhybrid._core import Batch, PagePool
from kvhybrid.cache import collector as module
from kvhybrid.cache.collector import EVICT_AT_ONCE, LOW_WATERMARK, Collector
from kvhybrid.cache.step import Step

BLOCK = 4
LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_dim=2, block_size=BLOCK)


def make(pages, **values):
    values = {"enable_gc": True, **values}
    config = KVCacheConfig(max_tokens=pages * BLOCK, block_size=BLOCK, _env_file=None, **values)
    return KVCache(config, layout=LAYOUT)


def compute(cache, tokens, first=0):
    """Take a text of so many tokens through one step, as every route does; return its sequence."""
    sequence = cache.pool.open(np.arange(first, first + tokens))
    step = Step.plan(cache.storage, Batch(cache.pool, [sequence]))
    new = torch.zeros(1, 1, step.num_tokens, 2)
    step.write(0, new, new)
    step.commit()
    return sequence


def used(cache):
    return cache.pool.num_pages - cache.pool.num_free


@pytest.fixture
def settle(monkeypatch):
    """Wait until a condition holds that a run made true, and until that run has ended."""
    ended, collect, running = threading.Condition(), Collector.collect, []

    def collect_and_tell(self):
        with ended:
            running.append(self)
        evicted = collect(self)
        with ended:
            running.clear()
            ended.notify_all()
        return evicted

    def wait(condition):
        with ended:
            found = ended.wait_for(lambda: condition() and not running, timeout=60)
        assert found, "nothing happened"

    monkeypatch.setattr(Collector, "collect", collect_and_tell)
    return wait


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "kvhybrid-collector"]


@given(pages=st.integers(1, 300), threshold=st.floats(0.001, 1), held=st.integers(0, 300))
def test_a_run_goes_from_the_threshold_to_the_low_watermark(pages, threshold, held):
    pool = PagePool(pages, BLOCK)
    collector = Collector(pool, threshold)
    assert 0 <= collector.low < collector.high <= pages
    assert collector.high >= pages * threshold
    assert collector.low <= pages * threshold * LOW_WATERMARK
    held = min(held, pages)
    if held:
        sequence = pool.open(np.arange(held * BLOCK))
        Batch(pool, [sequence]).plan().commit()
        sequence.close()
    evicted = collector.collect()
    assert evicted == collector.evicted_pages == (held - collector.low if held >= collector.high else 0)
    assert collector.runs == (evicted > 0)
    assert collector.collect() == 0


def test_what_leaves_first_is_what_was_used_longest_ago():
    pool = PagePool(20, BLOCK)
    for first in range(0, 2000, 100):
        sequence = pool.open(np.arange(first, first + BLOCK))
        Batch(pool, [sequence]).plan().commit()
        sequence.close()
    Collector(pool, 1.0).collect()
    left = [pool.match(np.arange(first, first + BLOCK)) for first in range(0, 2000, 100)]
    assert left == [0] * 4 + [BLOCK] * 16


def test_pinned_pages_stay():
    pool = PagePool(10, BLOCK)
    running = pool.open(np.arange(6 * BLOCK))
    Batch(pool, [running]).plan().commit()
    cold = pool.open(np.arange(1000, 1000 + 3 * BLOCK))
    Batch(pool, [cold]).plan().commit()
    collector = Collector(pool, 0.5)
    assert collector.collect() == collector.runs == 0
    cold.close()
    assert collector.collect() == 3
    assert (collector.runs, running.num_pages) == (1, 6)


def test_a_commit_that_crosses_the_threshold_starts_it(settle):
    cache = make(pages=100, gc_threshold=0.5)
    for first in range(0, 49_000, 1000):
        compute(cache, BLOCK, first).close()
    assert used(cache) == 49
    assert threads() == []
    compute(cache, BLOCK, 49_000).close()
    settle(lambda: used(cache) == 40)
    stats = cache.get_stats()
    assert stats["gc_runs"] == 1
    assert stats["gc_evicted_pages"] == stats["evicted_pages"] == 10
    assert len(threads()) == 1
    cache.close()
    assert threads() == []


def test_pages_that_are_let_go_start_it_too(settle):
    cache = make(pages=10, gc_threshold=0.5)
    sequence = compute(cache, 10 * BLOCK)
    assert used(cache) == 10
    sequence.close()
    cache.storage.settled()
    settle(lambda: used(cache) == 4)
    cache.close()


def test_process_kv_pushes_prefixes_out_and_keeps_its_own(settle):
    cache = make(pages=10, gc_threshold=0.8)
    compute(cache, 6 * BLOCK).close()
    new = torch.ones(1, 1, 4 * BLOCK, 2)
    cache.process_kv(new, new)
    settle(lambda: used(cache) == 6)
    assert torch.equal(cache.process_kv(new, new, 0)[0], new)
    cache.close()


def test_the_hard_cap_holds_without_it():
    cache = make(pages=10, enable_gc=False)
    for first in range(0, 30_000, 1000):
        compute(cache, 3 * BLOCK, first).close()
        assert cache.get_stats()["used_bytes"] <= cache.get_stats()["capacity_bytes"]
    with pytest.raises(CapacityError):
        compute(cache, 11 * BLOCK, 100_000)
    assert threads() == []
    assert cache.get_stats()["gc_runs"] == 0


def test_large_runs_go_in_small_batches(monkeypatch):
    sizes, pool = [], PagePool(1000, BLOCK)
    sequence = pool.open(np.arange(1000 * BLOCK))
    Batch(pool, [sequence]).plan().commit()
    sequence.close()

    class Counting:
        def __getattr__(self, name):
            return getattr(pool, name)

        def evict(self, count):
            sizes.append(count)
            return pool.evict(count)

    assert Collector(Counting(), 1.0).collect() == 200
    assert max(sizes) == EVICT_AT_ONCE
    assert sum(sizes) == 200


def test_below_the_threshold_nobody_is_woken(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("a thread was started")

    monkeypatch.setattr(module.threading, "Thread", fail)
    cache = make(pages=10, gc_threshold=1.0)
    for first in range(0, 9000, 1000):
        compute(cache, BLOCK, first).close()
    assert used(cache) == 9
    cache.close()


def test_a_cache_that_is_dropped_takes_its_thread_along(settle):
    cache = make(pages=10, gc_threshold=0.5)
    compute(cache, 8 * BLOCK).close()
    cache.storage.settled()
    pool = cache.pool
    settle(lambda: pool.num_free == 6)
    (thread,) = threads()
    gone = weakref.ref(cache.storage)
    del cache
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
    assert gone() is None


def test_a_closed_cache_starts_no_thread_again():
    cache = make(pages=10, gc_threshold=0.5)
    for _ in range(2):
        cache.close()
    compute(cache, 8 * BLOCK).close()
    cache.storage.settled()
    assert threads() == []
    assert used(cache) == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_starts_a_thread_of_its_own(settle):
    cache = make(pages=10, gc_threshold=0.5)
    compute(cache, 8 * BLOCK).close()
    cache.storage.settled()
    settle(lambda: used(cache) == 4)
    child = os.fork()
    if child == 0:
        result = 1
        try:
            compute(cache, 5 * BLOCK, 5000).close()
            cache.storage.settled()
            settle(lambda: used(cache) == 4)
            result = 0
        finally:
            os._exit(result)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    cache.close()


def test_texts_that_run_meanwhile_keep_every_page(settle):
    cache, rounds = make(pages=64, gc_threshold=0.3), 60
    start, errors = threading.Barrier(3), []

    def run(seed):
        try:
            start.wait()
            for number in range(rounds):
                first = (seed * rounds + number) * 1000
                tokens = np.arange(first, first + 5 * BLOCK)
                sequence = cache.pool.open(tokens)
                step = Step.plan(cache.storage, Batch(cache.pool, [sequence]))
                marked = torch.full((1, 1, step.num_tokens, 2), float(first))
                step.write(0, marked, marked)
                step.commit()
                table = step.spans[0].table
                out = torch.empty(1, 5 * BLOCK, 2), torch.empty(1, 5 * BLOCK, 2)
                cache.storage.gather(0, table, 0, 5 * BLOCK, out)
                assert (out[0] == first).all()
                sequence.close()
        except BaseException as error:  # noqa: BLE001  # raised below, in the test's own thread
            errors.append(error)

    runners = [threading.Thread(target=run, args=(seed,)) for seed in range(3)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert not errors, errors
    cache.storage.settled()
    collector = cache._collector
    settle(lambda: used(cache) < collector.high)
    cache.pool.check()
    assert cache.get_stats()["gc_evicted_pages"] > 0
    cache.close()


def test_a_codec_that_fails_is_counted_said_once_and_costs_no_eviction(settle, monkeypatch, caplog):
    layout = replace(LAYOUT, block_size=16)
    config = KVCacheConfig(
        max_tokens=20 * 16,
        block_size=16,
        use_quantization=True,
        quantization_bits=8,
        gc_threshold=0.5,
        enable_gc=True,
        _env_file=None,
    )
    cache = KVCache(config, layout=layout)
    thread_died = []
    monkeypatch.setattr(threading, "excepthook", thread_died.append)

    def fail(pairs):
        raise RuntimeError("no codec today")

    quantize, cache.storage.quantize = cache.storage.quantize, fail
    collector = cache._collector
    filled = 0
    while used(cache) < cache.pool.num_pages and cache.pool.num_free > cache.pool.num_free_quantized:
        compute(cache, 16, filled * 1000).close()
        filled += 1
    settle(lambda: collector.failures > 0)
    failures = collector.failures
    cache.storage.settled()
    settle(lambda: collector.failures > failures)
    cache.storage.quantize = quantize
    cache.storage.settled()
    settle(lambda: cache.get_stats()["quantized_tokens"] > 0)
    assert cache.get_stats()["gc_failures"] == collector.failures
    assert [record.getMessage() for record in caplog.records if record.exc_info] == [
        "background eviction failed and goes on; further failures are counted as gc_failures"
    ]
    assert thread_died == []
    cache.pool.check()
    cache.close()


def test_pages_are_evicted_though_none_can_be_quantized(monkeypatch):
    layout = replace(LAYOUT, block_size=16)
    config = KVCacheConfig(
        max_tokens=20 * 16, block_size=16, use_quantization=True, quantization_bits=8, _env_file=None
    )
    cache = KVCache(config, layout=layout)
    collector = Collector(cache.pool, 0.05, cache.storage)
    for number in range(cache.storage.num_full):
        compute(cache, 16, number * 1000).close()

    def fail(pairs):
        raise RuntimeError("no codec today")

    monkeypatch.setattr(cache.storage, "quantize", fail)
    assert collector.collect() > 0
    assert (collector.failures, collector.runs) == (1, 1)
    cache.pool.check()
    cache.close()
