"""Weeks of a service in seconds: memory stays flat, and no name, pin or page is left behind."""

import random
import resource
import sys

import numpy as np
import pytest
import torch

from kvhybrid import KVCache, KVCacheConfig, KVLayout
from kvhybrid._core import Batch
from kvhybrid.cache.namespaces import LEAST_KEPT

REQUESTS = 1_000_000
TENANTS = 10_000
ROWS = 10
# What the allocator may take beyond its highest mark of the first quarter: nothing that grows fits in it.
SLACK_MIB = 8


def peak_mib() -> float:
    """Return the most memory that the process ever had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1 << 10)


@pytest.fixture
def cache():
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype=torch.float32, block_size=8)
    return KVCache(KVCacheConfig(max_tokens=8192, block_size=8), layout=layout)


def serve(cache, choice, prompts, first):
    """Serve ten requests as an engine does: each may find, fail, be retained, pinned or hinted at."""
    pool, rows = cache.pool, []
    for request in range(first, first + ROWS):
        tenant = f"tenant {choice.randrange(TENANTS)}"
        # Every hundredth comes with a hook that nothing ever had before: with a name of its own.
        state = f"hook {request}" if request % 100 == 0 else "no hook"
        namespace = cache.tenant_namespace(tenant, "model", "1", "1", state)
        prompt = prompts[choice.randrange(len(prompts))]
        cache.hints.hold(request, prompt, namespace)
        sequence = pool.open(prompt, namespace)
        sequence.require_verification()
        cache.hints.drop(request)
        rows.append(sequence)
    plan = Batch(pool, rows).plan()
    outcome = choice.random()
    if outcome < 0.05:
        plan.abandon()
    elif outcome < 0.1:
        del plan  # its caller failed and told no one
    else:
        plan.commit()
    for sequence in rows:
        if choice.random() < 0.9:  # the model is looked at, and is what it was
            sequence.verify(sequence.length)
        if choice.random() < 0.05:
            sequence.retain(choice.randrange(-100, 101), choice.choice((None, 0.0, 60.0)), lapses=True)
        sequence.close()


def test_a_million_requests_of_ten_thousand_tenants_leave_nothing_behind(cache):
    choice = random.Random(9)
    numbers = np.random.default_rng(9)
    prompts = [numbers.integers(0, 1000, 6 + 3 * at).astype(np.int32) for at in range(12)]
    idle = cache.pool.statistics()
    for first in range(0, REQUESTS // 4, ROWS):
        serve(cache, choice, prompts, first)
    before, names = peak_mib(), len(cache._namespaces)
    for first in range(REQUESTS // 4, REQUESTS, ROWS):
        serve(cache, choice, prompts, first)
    assert peak_mib() - before < SLACK_MIB
    # As many names as have pages at most, twice, and those that are kept without.
    assert max(names, len(cache._namespaces)) <= max(2 * (cache.pool.num_pages + LEAST_KEPT), 4 * LEAST_KEPT)
    cache.pool.check()
    cache.clear()
    now = cache.pool.statistics()
    for key in ("free_pages", "pinned_pages", "mutable_pages", "sequences", "nodes"):
        assert now[key] == idle[key], key
