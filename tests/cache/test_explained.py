"""``cache.explain`` and what ``get_stats`` says of who rules."""

import json

import numpy as np
import pytest

from kvhybrid import KVCache, KVCacheConfig, KVLayout
from kvhybrid._core import Batch

pytestmark = pytest.mark.usefixtures("clean_environment")

BLOCK = 16


def make(**values):
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=BLOCK)
    return KVCache(KVCacheConfig(block_size=BLOCK, max_tokens=8 * BLOCK, **values), layout=layout)


def text(*blocks):
    return np.repeat(np.array(blocks, dtype=np.int32), BLOCK)


def store(cache, tokens, *names):
    sequence = cache.pool.open(np.append(tokens, np.int32(7)), cache.tenant_namespace(*names))
    Batch(cache.pool, [sequence]).plan(np.array([len(tokens)], dtype=np.int32)).commit()
    sequence.close()


@pytest.mark.parametrize("strategy", ["lru", "adaptive"])
def test_a_miss_is_explained_in_words_and_numbers(strategy):
    cache = make(cache_strategy=strategy)
    assert str(cache.explain(text(1, 2))) == "0 tokens cached, never seen"
    store(cache, text(1, 2, 3), "default", "model")
    found = cache.explain(text(1, 2, 9))
    assert (found.cached, found.diverged_at) == (2 * BLOCK, 2 * BLOCK)
    assert str(found) == "32 tokens cached, diverged at token 32"
    cache.clear()
    found = cache.explain(text(1, 2, 9))
    assert (found.cached, found.evicted, found.evicted_by) == (0, 2 * BLOCK, "asked")
    assert found.evicted_s_ago >= 0
    assert "32 evicted" in str(found)
    assert cache.explain(text(1, 2, 3)).diverged_at is None
    cache.close()


def test_what_another_tenant_has_is_not_told():
    cache = make()
    store(cache, text(1, 2), "a", "model")
    assert cache.explain(text(1, 2), tenant="a").cached == 2 * BLOCK
    assert str(cache.explain(text(1, 2), tenant="b")) == "0 tokens cached, never seen"
    shared = make(tenant_isolation=False)
    store(shared, text(1, 2), "a", "model")
    assert shared.explain(text(1, 2), tenant="b").cached == 2 * BLOCK


def test_what_are_no_token_ids_is_refused():
    with pytest.raises(ValueError, match="token ids"):
        make().explain(np.array([-1], dtype=np.int32))


def test_who_rules_is_in_the_statistics():
    adaptive = make(cache_strategy="adaptive").get_stats()
    assert adaptive["learned_order_rules"] == 0
    assert {"shadow_hit_rate_lru", "shadow_hit_rate_survival", "rule_changes", "lessons"} <= set(adaptive)
    json.dumps(adaptive)
    assert "learned_order_rules" not in make().get_stats()
