"""``process_kv`` when memory runs out, when anything else fails, and when threads meet: all or nothing."""

import threading

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvhybrid import CapacityError, KVCache, KVCacheConfig, KVLayout, OutOfMemoryError
from kvhybrid._core import Batch
from kvhybrid.cache import tensor_session
from kvhybrid.cache.memory import is_out_of_memory

LAYERS, HEADS, WIDTH, BLOCK = 2, 2, 4, 4


def make(pages):
    layout = KVLayout(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=WIDTH, block_size=BLOCK)
    config = KVCacheConfig(max_tokens=pages * BLOCK, block_size=BLOCK, _env_file=None)
    return KVCache(config, layout=layout)


def slice_of(tokens, batch=1):
    return torch.randn(batch, HEADS, tokens, WIDTH), torch.randn(batch, HEADS, tokens, WIDTH)


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found[:2], expected, strict=True))


def fill_with_prefixes(cache, pages):
    """Leave ``pages`` sealed pages behind that nobody holds."""
    sequence = cache.pool.open(np.arange(pages * BLOCK))
    Batch(cache.pool, [sequence]).plan().commit()
    sequence.close()
    assert cache.pool.num_evictable >= pages


def pages_of(cache):
    stats = cache.get_stats()
    return {name: stats[name] for name in ("free_pages", "mutable_pages", "sequences", "sessions")}


class FailAt(TorchDispatchMode):
    """Raises in place of torch operation number ``first``, and of those that follow while ``times`` lasts."""

    def __init__(self, error, first, times=1):
        super().__init__()
        self.error, self.first, self.times = error, first, times
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += 1
        if self.seen > self.first and self.times > 0:
            self.times -= 1
            raise self.error
        return func(*args, **(kwargs or {}))


def operations_of(cache, *arguments, **options):
    """How many torch operations a call takes."""
    with FailAt(None, 10**9) as counting:
        cache.process_kv(*arguments, **options)
    assert counting.seen > 4
    return counting.seen


def test_without_room_prefixes_leave_and_are_counted():
    cache = make(pages=8)
    fill_with_prefixes(cache, 8)
    part = slice_of(3 * BLOCK)
    *found, metadata = cache.process_kv(*part)
    assert same(found, part)
    assert metadata["evicted"] == 3
    assert cache.process_kv(*slice_of(1), layer_idx=1)[2]["evicted"] == 0


@pytest.mark.parametrize("asked", [OutOfMemoryError, CapacityError, torch.OutOfMemoryError])
def test_more_than_the_budget_is_refused_and_nothing_is_lost(asked):
    cache, part = make(pages=8), slice_of(5)
    fill_with_prefixes(cache, 4)
    cache.process_kv(*part, session_id="a")
    before, prefix = pages_of(cache), np.arange(4 * BLOCK)
    with pytest.raises(asked, match=r"no room for 40 tokens in 1 rows of session 'b'.*needs 10 pages"):
        cache.process_kv(*slice_of(40), session_id="b")
    with pytest.raises(asked, match=r"no room for 28 tokens .* session 'a'.*needs 7 pages, 2 free"):
        cache.process_kv(*slice_of(28), session_id="a")
    assert pages_of(cache) == before
    assert cache.pool.match(prefix) == len(prefix), "what could not help was evicted all the same"
    assert same(cache.process_kv(*slice_of(5), 0, session_id="a"), part)
    cache.process_kv(*slice_of(3), session_id="a")
    cache.pool.check()


def test_other_sessions_are_never_what_leaves():
    cache = make(pages=4)
    parts = {name: slice_of(BLOCK) for name in "abcd"}
    for name, part in parts.items():
        cache.process_kv(*part, session_id=name)
    with pytest.raises(OutOfMemoryError):
        cache.process_kv(*slice_of(1), session_id="e")
    with pytest.raises(OutOfMemoryError):
        cache.process_kv(*slice_of(1), session_id="a")
    for name, part in parts.items():
        assert same(cache.process_kv(*slice_of(BLOCK), 0, session_id=name), part)
    cache.drop_session("d")
    cache.process_kv(*slice_of(1), session_id="a")


def test_room_that_others_give_back_meanwhile_is_found_by_the_second_try(monkeypatch):
    cache = make(pages=4)
    cache.process_kv(*slice_of(3 * BLOCK), session_id="a")
    cache.process_kv(*slice_of(1), session_id="b")

    class Late:
        """A batch whose first plan comes too early."""

        def __init__(self, pool, rows):
            self.batch = Batch(pool, rows)

        def plan(self, counts, *, tokens):
            try:
                return self.batch.plan(counts, tokens=tokens)
            except CapacityError:
                cache.drop_session("a")
                raise

    monkeypatch.setattr(tensor_session, "Batch", Late)
    part = slice_of(2 * BLOCK)
    assert same(cache.process_kv(*part, session_id="c"), part)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("layer", range(LAYERS))
@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_runs_out_once_at_any_operation_costs_a_try(error, layer):
    first, part = slice_of(5, batch=2), slice_of(6, batch=2)
    expected = [torch.cat(pair, dim=2) for pair in zip(first, part, strict=True)]

    def prepared():
        cache = make(pages=64)
        fill_with_prefixes(cache, 8)
        cache.process_kv(*first, layer_idx=0)
        cache.process_kv(*first, layer_idx=1)
        cache.process_kv(*part, layer_idx=1 - layer)
        return cache

    for first_failing in range(operations_of(prepared(), *part, layer_idx=layer)):
        cache = prepared()
        with FailAt(error, first_failing) as faults:
            *found, metadata = cache.process_kv(*part, layer_idx=layer)
        assert faults.times == 0
        assert same(found, expected)
        assert metadata["evicted"] == 4
        assert metadata["tokens"] == 6
        cache.pool.check()


@pytest.mark.parametrize(
    "error",
    [*OUT_OF_MEMORY, RuntimeError("something else"), KeyboardInterrupt()],
    ids=lambda error: f"{type(error).__name__} {error}"[:24],
)
def test_whatever_fails_at_any_operation_leaves_the_session_as_it_was(error):
    first, part = slice_of(5, batch=2), slice_of(6, batch=2)
    cache = make(pages=64)
    count = operations_of(cache, *part, session_id="scratch")
    cache.drop_session("scratch")
    empty = pages_of(cache)
    is_memory = is_out_of_memory(error)
    expected = OutOfMemoryError if is_memory else type(error)
    for first_failing in range(count):
        with pytest.raises(expected) as caught, FailAt(error, first_failing, times=10**9):
            cache.process_kv(*part)
        assert (caught.value is error) != is_memory
        assert not is_memory or caught.value.__cause__ is error
        assert pages_of(cache) == empty, "a session that never began was left behind"
    cache.process_kv(*first, layer_idx=0)
    before = pages_of(cache)
    for layer in range(LAYERS):
        for first_failing in range(count):
            with pytest.raises(expected), FailAt(error, first_failing, times=10**9):
                cache.process_kv(*part, layer_idx=layer)
            assert pages_of(cache) == before
    cache.pool.check()
    assert same(cache.process_kv(*slice_of(5, batch=2), 0), first)
    assert same(cache.process_kv(*part, layer_idx=1), part)
    expected_keys = torch.cat([first[0], part[0]], dim=2)
    assert torch.equal(cache.process_kv(*part)[0], expected_keys)


@pytest.mark.parametrize("where", ["plan", "fill"])
@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_a_plan_that_fails_is_abandoned(monkeypatch, where, error):
    cache, first = make(pages=16), slice_of(5)
    cache.process_kv(*first)

    class Failing:
        def __init__(self, inner):
            self.inner = inner

        def plan(self, counts, *, tokens):
            if where == "plan":
                raise error
            return Failing(self.inner.plan(counts, tokens=tokens))

        def fill(self, *buffers):
            raise error

        def __getattr__(self, name):
            return getattr(self.inner, name)

    monkeypatch.setattr(tensor_session, "Batch", lambda *given: Failing(Batch(*given)))
    before = pages_of(cache)
    with pytest.raises(OutOfMemoryError if error is MemoryError else error):
        cache.process_kv(*slice_of(3), session_id="b")
    assert pages_of(cache) == before
    cache.pool.check()
    monkeypatch.undo()
    part = slice_of(9)
    assert same(cache.process_kv(*part, session_id="b"), part)


def run_all(*calls):
    """Run the calls in threads that start together; raise what any of them raised."""
    start, errors = threading.Barrier(len(calls)), []

    def run(call):
        try:
            start.wait()
            call()
        except BaseException as error:  # noqa: BLE001  # raised below, in the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_with_sessions_of_their_own_do_not_see_each_other():
    cache = make(pages=256)

    def converse(name):
        def call():
            generator = torch.Generator().manual_seed(ord(name))
            held = [torch.empty(2, HEADS, 0, WIDTH)] * (2 * LAYERS)
            for _ in range(12):
                for layer in range(LAYERS):
                    part = [torch.randn(2, HEADS, 5, WIDTH, generator=generator) for _ in "kv"]
                    for index in range(2):
                        held[2 * layer + index] = torch.cat([held[2 * layer + index], part[index]], dim=2)
                    found = cache.process_kv(*part, layer_idx=layer, session_id=name)
                    assert same(found, held[2 * layer : 2 * layer + 2])
            assert cache.drop_session(name)

        return call

    run_all(*(converse(name) for name in "abcd"))
    cache.pool.check()
    assert pages_of(cache) == {"free_pages": 256, "mutable_pages": 0, "sequences": 0, "sessions": 0}


def test_threads_that_bring_a_layer_each_to_one_session_share_its_pages():
    cache, counts = make(pages=256), [1, 7, 2, 5, 16, 1, 1]
    parts = {(layer, step): slice_of(n) for layer in range(LAYERS) for step, n in enumerate(counts)}

    def bring(layer):
        def call():
            for step in range(len(counts)):
                found = cache.process_kv(*parts[layer, step], layer_idx=layer)
                held = [torch.cat([parts[layer, s][i] for s in range(step + 1)], dim=2) for i in range(2)]
                assert same(found, held)

        return call

    run_all(*(bring(layer) for layer in range(LAYERS)))
    assert cache.get_stats()["used_bytes"] == -(-sum(counts) // BLOCK) * cache.layout.bytes_per_page


def test_dropping_and_closing_while_others_call_loses_no_page():
    cache = make(pages=64)

    def call():
        for _ in range(60):
            part = slice_of(3)
            key, value, metadata = cache.process_kv(*part)
            at = metadata["position"]
            assert same((key[:, :, at:], value[:, :, at:]), part)

    def drop():
        for _ in range(60):
            cache.drop_session()

    def until_out_of_room():
        try:
            call()
        except OutOfMemoryError:
            cache.drop_session()

    run_all(until_out_of_room, until_out_of_room, drop, drop)
    cache.close()
    cache.pool.check()
    assert pages_of(cache) == {"free_pages": 64, "mutable_pages": 0, "sequences": 0, "sessions": 0}


def test_a_session_dropped_while_a_call_waits_for_it_begins_anew():
    cache, part = make(pages=16), slice_of(5)
    cache.process_kv(*slice_of(7, batch=2))
    session = cache._tensors._known["default", "default"]
    turn = session.turn

    class Late:
        """A turn that another thread is faster to: it drops the session first."""

        def __enter__(self):
            session.turn = turn
            assert cache.drop_session()
            return turn.__enter__()

        def __exit__(self, *exc_info):
            return turn.__exit__(*exc_info)

    session.turn = Late()
    *found, metadata = cache.process_kv(*part)
    assert same(found, part)
    assert metadata["position"] == 0
    assert pages_of(cache) == {"free_pages": 14, "mutable_pages": 2, "sequences": 1, "sessions": 1}
