"""``KVCache.retain`` and ``pin``: what is said of texts by their tokens."""

import numpy as np
import pytest

from kvhybrid import CapacityError, ConfigError, InvalidRequestError, KVCache, KVCacheConfig, KVLayout
from kvhybrid._core import Batch

pytestmark = pytest.mark.usefixtures("clean_environment")

BLOCK = 16


def make(**values):
    layout = KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_size=BLOCK)
    return KVCache(KVCacheConfig(block_size=BLOCK, max_tokens=8 * BLOCK, **values), layout=layout)


def text(*blocks):
    return np.repeat(np.array(blocks, dtype=np.int32), BLOCK)


def store(cache, tokens):
    sequence = cache.pool.open(np.append(tokens, np.int32(7)), cache.tenant_namespace("default", "model"))
    Batch(cache.pool, [sequence]).plan(np.array([len(tokens)], dtype=np.int32)).commit()
    sequence.close()


A, B, C, D = (text(10 * n, 10 * n + 1) for n in range(1, 5))


def cached(cache, *texts, **names):
    return [cache.explain(each, **names).cached // BLOCK for each in texts]


@pytest.fixture(params=["lru", "adaptive"])
def cache(request):
    cache = make(cache_strategy=request.param)
    cache.pool.set_time(0)
    for each in (A, B, C):
        store(cache, each)
    yield cache
    cache.pool.check()
    cache.close()


def test_priorities_say_who_leaves_first(cache):
    assert cache.retain(A, priority=-3) == 2 * BLOCK
    assert cache.retain(B, priority=3) == 2 * BLOCK
    left = []
    for _ in range(3):
        cache.pool.evict(2)
        left.append(cached(cache, A, B, C))
    assert left == [[0, 2, 2], [0, 2, 0], [0, 0, 0]]
    assert cache.explain(A).evicted_by == "priority"


def test_time_to_live_protects_and_then_gives_up(cache):
    cache.retain(A, ttl_s=60)
    cache.pool.evict(4)
    assert cached(cache, A, B, C) == [2, 0, 0]
    store(cache, D)
    cache.pool.set_time(61_000_000)
    cache.pool.evict(2)
    assert cached(cache, A, D) == [0, 2]
    assert cache.explain(A).evicted_by == "ttl"
    assert str(cache.explain(A)).endswith("(ttl)")
    stats = cache.get_stats()
    assert (stats["evicted_ttl_pages"], stats["evicted_asked_pages"], stats["evicted_pages"]) == (2, 4, 6)


def test_a_range_is_retained_and_what_stands_before_it_stays_with_it(cache):
    assert cache.retain(A, start=BLOCK, priority=5) == 2 * BLOCK
    assert cache.retain(B, stop=BLOCK, priority=5) == BLOCK
    cache.pool.evict(3)
    assert cached(cache, A, B, C) == [2, 1, 0]


def test_what_was_said_is_replaced_and_taken_back(cache):
    cache.retain(A, priority=-1)
    cache.retain(A)
    cache.retain(B, priority=-1)
    cache.pool.evict(2)
    assert cached(cache, A, B) == [2, 0]


def test_what_is_not_cached_is_not_retained(cache):
    assert cache.retain(np.concatenate([A, D]), priority=1) == 2 * BLOCK
    assert cache.retain(D, priority=1) == 0
    assert cache.retain(A, tenant="other", priority=-1) == 0
    with pytest.raises(InvalidRequestError, match="32 tokens is cached"):
        cache.pin(D)


def test_a_pin_holds_until_it_is_released(cache):
    pin = cache.pin(A)
    assert (pin.num_tokens, pin.is_held) == (2 * BLOCK, True)
    assert repr(pin) == "Pin(32 tokens)"
    assert cache.clear() == 4
    assert cached(cache, A, B, C) == [2, 0, 0]
    assert cache.get_stats()["user_pinned_pages"] == 2
    pin.release()
    pin.release()
    assert not pin.is_held
    assert cache.clear() == 2


def test_a_pin_that_is_dropped_or_too_old_holds_nothing(cache):
    pin = cache.pin(A)
    del pin
    lease = cache.pin(B, ttl_s=5)
    assert cache.get_stats()["user_pins"] == 1
    cache.pool.set_time(6_000_000)
    store(cache, D)
    assert not lease.is_held
    assert cache.get_stats()["user_pinned_pages"] == 0


def test_pins_leave_room_to_run(cache):
    pins = [cache.pin(A), cache.pin(B)]
    message = "needs 2 pages to pin, 4 pinned of at most 4 of 8"
    with pytest.raises(CapacityError, match=message):
        cache.pin(C)
    assert cache.get_stats()["most_user_pinned_pages"] == 4
    assert cache.pin(A[:BLOCK]).num_tokens == BLOCK, "what is pinned already costs nothing"
    pins.pop().release()
    assert cache.pin(C).num_tokens == 2 * BLOCK


def test_how_much_may_be_pinned_is_set():
    with pytest.raises(ConfigError, match=r"max_pinned_share=0\.95: must be a number from 0 to 0\.9"):
        KVCacheConfig(max_pinned_share=0.95)
    cache = make(max_pinned_share=0)
    store(cache, A)
    with pytest.raises(CapacityError, match="at most 0 of 8"):
        cache.pin(A)
    cache.close()


def test_pins_end_with_what_they_were_pinned_for(cache):
    pin = cache.pin(A)
    cache.drop_namespaces(lambda parts: True)
    assert not pin.is_held
    assert cache.get_stats()["sealed_pages"] == 0


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"priority": 101}, "priority=101: must be a whole number from -100 to 100"),
        ({"priority": 1.5}, "priority=1.5"),
        ({"priority": True}, "priority=True"),
        ({"ttl_s": -1}, "ttl_s=-1: must be a number of seconds from 0 to 1000000000"),
        ({"ttl_s": float("nan")}, "ttl_s=nan"),
        ({"ttl_s": 10**400}, "ttl_s=1000"),
        ({"ttl_s": "60"}, "ttl_s='60'"),
        ({"start": -1}, "start=-1: must be a whole number of at least 0"),
        ({"start": 33}, "start=33: lies behind stop=None, or 32 tokens"),
        ({"start": 8, "stop": 4}, "start=8: lies behind stop=4"),
    ],
)
def test_what_cannot_be_meant_is_refused(cache, said, message):
    with pytest.raises(InvalidRequestError, match=message):
        cache.retain(A, **said)


def test_what_are_no_token_ids_is_refused(cache):
    for call in (cache.pin, cache.retain):
        with pytest.raises(ValueError, match="token ids"):
            call(np.array([-1], dtype=np.int32))
