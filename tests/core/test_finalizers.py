"""Handles that go at any moment, in any thread: their pool takes all back, and nobody waits."""

import gc
import threading
from functools import partial

import numpy as np
import pytest

from kvhybrid import ClosedError
from kvhybrid._core import Batch, PagePool, TokenBuffer

TOKENS = np.arange(40, dtype=np.int32)


class Cell:
    """Holds itself, so that the collector alone frees it, and what it has."""

    def __init__(self, *held):
        self.me, self.held = self, held


@pytest.fixture
def eager_collector():
    """Collect at every allocation of a container."""
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    yield
    gc.set_threshold(*before)


def leave(pool):
    """Leave one of each kind of handle to the collector: with work open, a pin, a hint, a plan."""
    gc.disable()
    sequence = pool.open(TOKENS)
    batch = Batch(pool, [sequence])
    plan = batch.plan()
    held = [plan, sequence, batch, TokenBuffer(TOKENS)]
    if pool.match(TOKENS):
        held += [pool.pin(TOKENS), pool.hint(TOKENS, most_pages=32)]
    Cell(*held)
    gc.enable()


def cached(pool):
    sequence = pool.open(TOKENS)
    Batch(pool, [sequence]).plan().commit()
    sequence.close()


CALLS = [
    lambda pool, sequence: pool.rule(),
    lambda pool, sequence: pool.statistics(),
    lambda pool, sequence: pool.explain(TOKENS),
    lambda pool, sequence: pool.pin(TOKENS).release(),
    lambda pool, sequence: pool.which_exist(np.arange(3)),
    lambda pool, sequence: repr(pool),
    lambda pool, sequence: (sequence.tokens(), sequence.block_table(), repr(sequence)),
    lambda pool, sequence: sequence.fork().close(),
    lambda pool, sequence: Batch(pool, [sequence]).plan().copies,
    lambda pool, sequence: TokenBuffer(TOKENS).tobytes(),
    lambda pool, sequence: refused(pool),
]


def refused(pool):
    with pytest.raises(ValueError, match="start=99"):
        pool.retain(TOKENS, start=99)


@pytest.mark.usefixtures("eager_collector")
@pytest.mark.parametrize("policy", ["lru", "adaptive"])
@pytest.mark.parametrize("call", CALLS)
def test_the_collector_may_run_within_any_call(call, policy):
    pool = PagePool(64, 8, policy=policy, seed=1)
    cached(pool)
    sequence = pool.open(np.append(TOKENS, np.int32(7)))
    for _ in range(50):
        leave(pool)
        call(pool, sequence)
    sequence.close()
    gc.collect()
    pool.check()
    found = pool.statistics()
    assert (found["sequences"], found["mutable_pages"], found["user_pins"]) == (0, 0, 0)


def run(works, pool, ends):
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for _ in range(2000):
        pool.statistics()
    ends.set()
    for thread in threads:
        thread.join()


def test_handles_go_in_many_threads_while_others_work():
    pool = PagePool(512, 8)
    cached(pool)
    handles = [[] for _ in range(4)]
    ends = threading.Event()
    failed = []

    def work(own):
        try:
            while not ends.is_set():
                sequence = pool.open(np.append(TOKENS, np.int32(len(own))))
                plan = Batch(pool, [sequence]).plan()
                plan.fill(np.empty((1, 9), np.int32), np.empty(9, np.int32), np.empty((1, 2), np.int32))
                own.append((plan, sequence, pool.pin(TOKENS, ttl_s=1.0)))
        except Exception as error:  # noqa: BLE001  # told at the end
            failed.append(str(error))

    def let_go():
        while not ends.is_set():
            for own in handles:
                del own[:-2]

    run([partial(work, own) for own in handles] + [let_go] * 2, pool, ends)
    for own in handles:
        own.clear()
    gc.collect()
    assert not [error for error in failed if "pages" not in error and "pinned" not in error]
    pool.check()
    found = pool.statistics()
    assert (found["sequences"], found["mutable_pages"], found["user_pins"]) == (0, 0, 0)


def test_a_closed_handle_is_closed_once():
    pool = PagePool(16, 8)
    sequence = pool.open(TOKENS)
    plan = Batch(pool, [sequence]).plan()
    plan.commit()
    sequence.close()
    del plan
    other = pool.open(TOKENS)
    del sequence  # the other one has its place among the sequences now
    assert other.length == 39
    with pytest.raises(ClosedError):
        Batch(pool, [other]).plan().commit()
        other.close()
        other.append(TOKENS)
