"""``KVCache``: how large it is, who shares what, whose sessions it keeps, and what it says of itself."""

import json
import threading

import numpy as np
import pytest
import torch

from kvhybrid import (
    ClosedError,
    ConfigError,
    KVCache,
    KVCacheConfig,
    KVLayout,
    LayoutError,
    UnsupportedError,
)
from kvhybrid._core import Batch

pytestmark = pytest.mark.usefixtures("clean_environment")


def layout_of(**changes):
    return KVLayout(**{"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "block_size": 16, **changes})


def make(layout=None, **values):
    layout = layout if layout is not None else layout_of()
    return KVCache(KVCacheConfig(**{"block_size": layout.block_size, **values}), layout=layout)


class Session:
    def __init__(self, name, tenant):
        self.name, self.tenant = name, tenant
        self.closed = 0

    def close(self):
        self.closed += 1


def test_max_tokens_is_never_exceeded():
    cache = make(max_tokens=100)
    assert cache.pool.num_pages == cache.storage.num_pages == 6
    assert cache.get_stats()["capacity_tokens"] == 96
    assert cache.storage.keys[0].shape == (6, 2, 16, 8)


def test_max_memory_mb_is_never_exceeded():
    layout = layout_of()
    page = layout.bytes_per_page
    cache = make(layout, max_tokens=10_000, max_memory_mb=(5 * page + page - 1) / 2**20)
    assert cache.pool.num_pages == 5
    assert cache.storage.nbytes == cache.get_stats()["capacity_bytes"] == 5 * page


def test_of_two_budgets_the_smaller_wins():
    page = layout_of().bytes_per_page
    assert make(max_tokens=32, max_memory_mb=100).pool.num_pages == 2
    assert make(max_tokens=8192, max_memory_mb=3 * page / 2**20).pool.num_pages == 3


def test_half_precision_holds_twice_the_tokens():
    budget = 8 * layout_of().bytes_per_page / 2**20
    sizes = [
        make(layout_of(dtype=dtype), max_memory_mb=budget).pool.num_pages for dtype in ("float32", "float16")
    ]
    assert sizes == [8, 16]


def test_a_budget_that_holds_no_page_is_a_config_error_with_the_numbers():
    page = layout_of().bytes_per_page
    with pytest.raises(ConfigError, match=f"hold no page of {page} bytes"):
        make(max_memory_mb=(page - 1) / 2**20)


def test_without_a_config_the_layout_decides_the_block_size():
    cache = KVCache(layout=layout_of(block_size=32))
    assert cache.config.block_size == cache.pool.block_size == 32
    assert cache.get_stats()["capacity_tokens"] == cache.config.max_tokens == 8192


def test_config_and_layout_must_agree_on_the_block_size():
    with pytest.raises(LayoutError, match=r"config.block_size=64, the layout says 16"):
        KVCache(KVCacheConfig(), layout=layout_of())


def test_config_and_layout_must_agree_on_the_dtype():
    with pytest.raises(LayoutError, match=r"config.dtype=float16, the layout says float32"):
        make(dtype="float16")
    assert make(layout_of(dtype="float16"), dtype=torch.float16).storage.dtype == torch.float16


def test_what_cuda_alone_can_do_is_ignored_with_a_warning():
    with pytest.warns(UserWarning, match="pin_memory and non_blocking are ignored on cpu"):
        make(pin_memory=True, non_blocking=True)


def test_namespaces_are_given_out_not_hashed():
    cache = make()
    names = [(), ("",), ("", ""), ("a",), ("a", "b"), ("ab",), ("a", "b", ""), ("b", "a")]
    numbers = [cache.namespace(*name) for name in names]
    assert sorted(numbers) == list(range(len(names)))
    assert [cache.namespace(*name) for name in names] == numbers


def test_namespaces_given_out_at_once_do_not_collide():
    cache, start, found = make(), threading.Barrier(4), {}

    def ask(first):
        start.wait()
        for n in range(200):
            name = str((first * 50 + n) % 300)
            assert found.setdefault(name, number := cache.namespace(name)) == number

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found.values())) == len(found)


def test_every_tenant_has_its_own_namespace():
    cache = make()
    names = ["", "default", "one", "two"]
    assert len({cache.tenant_namespace(name) for name in names}) == len(names)
    assert cache.tenant_namespace("one") == cache.tenant_namespace("one")
    assert cache.tenant_namespace("one") != cache.namespace("one")


def test_without_isolation_all_tenants_share_one():
    cache = make(tenant_isolation=False)
    assert len({cache.tenant_namespace(name) for name in ("", "one", "two")}) == 1


def test_one_tenants_pages_are_not_found_by_another():
    tokens = np.arange(40)
    for isolated, found in ((True, 0), (False, 32)):
        cache = make(tenant_isolation=isolated)
        sequence = cache.pool.open(tokens, cache.tenant_namespace("one"))
        Batch(cache.pool, [sequence]).plan().commit()
        assert cache.pool.match(tokens, cache.tenant_namespace("two")) == found
        assert cache.pool.match(tokens, cache.tenant_namespace("one")) == 32


def test_a_session_without_a_model_is_refused_with_the_way_out():
    cache = make()
    with pytest.raises(UnsupportedError, match=r"no model is attached .* kvhybrid.attach\(model, cache\)"):
        cache.session("a")
    assert cache.get_stats()["sessions"] == 0
    assert cache.drop_session("a") is False


def test_the_same_id_of_the_same_tenant_is_the_same_session():
    cache = make()
    cache.on_session(Session)
    one = cache.session("a", tenant="x")
    assert cache.session("a", tenant="x") is one
    assert (one.name, one.tenant) == ("a", "x")
    others = [cache.session("b", tenant="x"), cache.session("a", tenant="y"), cache.session()]
    assert len({id(session) for session in (one, *others)}) == 4
    assert cache.session() is cache.session("default", tenant="default")
    assert cache.get_stats()["sessions"] == 4


def test_a_dropped_session_is_closed_and_made_anew():
    cache = make()
    cache.on_session(Session)
    one, other = cache.session("a"), cache.session("a", tenant="y")
    assert cache.drop_session("a") is True
    assert (one.closed, other.closed) == (1, 0)
    assert cache.drop_session("a") is False
    assert cache.session("a") is not one


def test_taking_the_maker_away_takes_its_sessions_away():
    cache = make()
    cache.on_session(Session)
    sessions = [cache.session(name) for name in "abc"]
    cache.on_session(None)
    assert [session.closed for session in sessions] == [1, 1, 1]
    assert cache.get_stats()["sessions"] == 0
    with pytest.raises(UnsupportedError):
        cache.session("a")


def test_a_session_asked_for_while_the_cache_closes_is_refused_as_by_a_closed_one():
    cache = make()
    cache.on_session(lambda name, tenant: pytest.fail("made a session of a closed cache"))
    lock = cache._lock

    class ClosedMeanwhile:
        def __enter__(self):
            cache._lock = lock
            cache.close()
            return lock.__enter__()

        def __exit__(self, *exc_info):
            lock.__exit__(*exc_info)

    cache._lock = ClosedMeanwhile()
    with pytest.raises(ClosedError):
        cache.session("alice")


def test_a_session_that_cannot_be_made_is_not_remembered():
    cache = make()

    def fail(name, tenant):
        raise LayoutError(name)

    cache.on_session(fail)
    with pytest.raises(LayoutError):
        cache.session("a")
    assert cache.get_stats()["sessions"] == 0


def test_the_statistics_are_flat_and_ready_for_json():
    stats = make().get_stats()
    assert all(type(name) is str and type(value) in (int, float) for name, value in stats.items())
    assert json.loads(json.dumps(stats)) == stats
    named = {"hit_rate", "memory_usage", "used_bytes", "capacity_bytes", "capacity_tokens", "sessions"}
    assert named | set(make().pool.statistics()) <= set(stats)
    assert stats["hit_rate"] == stats["memory_usage"] == stats["used_bytes"] == 0


def test_the_statistics_say_how_much_is_used_and_how_much_was_found():
    cache = make(max_tokens=160)
    tokens = np.arange(40)
    sequence = cache.pool.open(tokens)
    Batch(cache.pool, [sequence]).plan().commit()
    sequence.close()
    again = cache.pool.open(tokens)
    stats = cache.get_stats()
    assert stats["hit_rate"] == again.cached / 80 == 39 / 80
    assert stats["memory_usage"] == 3 / 10
    assert stats["used_bytes"] == 3 * cache.layout.bytes_per_page


def test_clearing_evicts_what_nobody_holds():
    cache = make()
    for start in (0, 100):
        sequence = cache.pool.open(np.arange(start, start + 32))
        Batch(cache.pool, [sequence]).plan().commit()
        if start == 0:
            sequence.close()
    assert cache.clear() == 2
    assert cache.clear() == 0
    assert cache.pool.match(np.arange(32)) == 0
    assert cache.pool.match(np.arange(100, 132)) == 32 == sequence.length


def test_closing_closes_every_session_once_and_refuses_new_ones():
    cache = make()
    cache.on_session(Session)
    sessions = [cache.session("a"), cache.session("b", tenant="x")]
    for _ in range(2):
        cache.close()
    assert [session.closed for session in sessions] == [1, 1]
    with pytest.raises(ClosedError, match="the cache is closed"):
        cache.session("a")
    assert cache.get_stats()["sessions"] == 0
    assert repr(cache).startswith("<KVCache closed, 0/")
