"""Whose pages they are when sequences, plans and pools go, and what threads see of each other."""

import gc
import sys
import threading

import numpy as np
import pytest
from native import PROMPT, held, ids

from kvhybrid._core import (
    Batch,
    CapacityError,
    ClosedError,
    PagePool,
)


@pytest.mark.parametrize("how", ["close", "drop"])
@pytest.mark.parametrize("when", ["before fill", "after fill"])
@pytest.mark.parametrize("end", ["commit", "abandon", "drop"])
def test_a_sequence_closed_in_an_open_plan_goes_when_that_is_finished(how, when, end, pool):
    sequence, other = pool.open(ids(*PROMPT)), pool.open(ids(50, 51))
    plan = Batch(pool, [sequence, other]).plan()
    tables, slots, lengths = (
        np.full((2, 2), -1, np.int32),
        np.full(9, -1, np.int32),
        np.empty((2, 2), np.int32),
    )
    if when == "after fill":
        plan.fill(tables, slots, lengths)
    if how == "close":
        sequence.close()
        assert sequence.closed
        with pytest.raises(ClosedError):
            sequence.block_table()
    else:
        del sequence
    pool.check()
    assert pool.num_free == 5, "its pages are the plan's"
    if when == "before fill":
        plan.fill(tables, slots, lengths)
    assert len(set(slots.tolist())) == 9
    assert lengths.tolist() == [[0, 7], [0, 2]]
    if end == "drop":
        del plan
    else:
        getattr(plan, end)()
    pool.check()
    assert pool.statistics()["sequences"] == 1
    assert pool.match(ids(*PROMPT)) == (7 if end == "commit" else 0)
    assert other.length == (2 if end == "commit" else 0)
    other.close()
    assert pool.num_free + pool.num_evictable == 8


@pytest.mark.parametrize("how", ["close", "drop", "cycle"])
def test_a_sequence_that_goes_gives_its_pages_back(how, compute):
    pool = PagePool(8, 4, keep_tails=False)
    sequence = pool.open(ids(*PROMPT))
    compute(pool, sequence)
    assert pool.num_free == 6
    if how == "close":
        sequence.close()
    elif how == "drop":
        del sequence
    else:
        circle = [sequence]
        circle.append(circle)
        del sequence, circle
        gc.collect()
    assert (pool.num_free, pool.num_evictable) == (7, 1)
    assert held(pool) == (0, 0)


def test_a_dropped_plan_is_abandoned(pool):
    sequence = pool.open(ids(*PROMPT))
    plan = Batch(pool, [sequence]).plan(tokens=ids(8))
    assert pool.num_free == 6
    del plan
    assert pool.num_free == 8
    assert (sequence.length, sequence.pending, sequence.num_pages) == (0, 7, 0)
    assert pool.statistics()["abandoned_plans"] == 1


def test_handles_keep_the_pool_alive():
    sequence = PagePool(8, 4).open(ids(*PROMPT))
    batch = Batch(PagePool(8, 4))
    gc.collect()
    assert sequence.pending == 7
    assert len(batch) == 0
    sequence.fork().close()


def test_ten_thousand_sequences_come_and_go_and_leave_nothing():
    pool = PagePool(64, 4, keep_tails=False)
    prompts = [np.arange(n, n + 3, dtype=np.int32) for n in range(100)]
    opened = 0
    grown = []
    for _ in range(2):
        for n in range(5_000):
            sequence = pool.open(prompts[n % 100], n % 7)
            plan = Batch(pool, [sequence]).plan()
            if n % 3:
                plan.commit()
            opened += 1
            del sequence, plan
        grown.append(pool.bookkeeping_bytes())
    now = pool.statistics()
    gone = ("mutable_pages", "sealed_pages", "shared_pages", "pinned_pages", "sequences", "nodes")
    assert [now[name] for name in gone] == [0] * len(gone)
    assert (now["opens"], now["free_pages"]) == (opened, 64) == (10_000, 64)
    assert grown[0] == grown[1]
    pool.check()


def test_threads_that_share_a_pool_do_not_see_each_other():  # noqa: C901  # told in one piece
    pool = PagePool(48, 4)
    memory = np.zeros((48, 4), np.int64)
    prompts = [[stem, *range(10, 10 + length)] for stem in (1, 2) for length in (3, 8, 17)]
    failures, refused = [], []
    start = threading.Barrier(4)

    def run(seed):
        choose = np.random.default_rng(seed)
        try:
            start.wait()
            for _ in range(300):
                prompt = prompts[choose.integers(len(prompts))]
                sequence = pool.open(ids(*prompt), reuse=bool(choose.integers(4)))
                batch = Batch(pool, [sequence])
                for tokens in (None, ids(100 + seed), ids(7)):
                    try:
                        plan = batch.plan(tokens=tokens)
                    except CapacityError:
                        refused.append(seed)
                        break
                    tables = np.empty((1, plan.max_pages), np.int32)
                    slots = np.empty(plan.num_tokens, np.int32)
                    lengths = np.empty((1, 2), np.int32)
                    plan.fill(tables, slots, lengths)
                    for source, destination in plan.copies:
                        memory[destination] = memory[source]
                    text = np.frombuffer(sequence.tokens(), np.uint32)
                    # What a slot holds depends on everything before it, as K and V do.
                    written = np.cumsum(text.astype(np.int64) * (np.arange(len(text)) + 1))
                    memory.ravel()[slots] = written[lengths[0, 0] :]
                    if choose.integers(8) == 0:
                        plan.abandon()
                        break
                    plan.commit()
                    table = np.frombuffer(sequence.block_table(), np.int32)
                    assert np.array_equal(memory[table].ravel()[: sequence.length], written)
                if choose.integers(2):
                    sequence.close()
        except BaseException as error:  # noqa: BLE001  # it must reach the test's thread
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(refused) < 600
    pool.check()
    assert held(pool) == (0, 0)
    assert pool.num_free + pool.num_evictable == 48
    assert pool.statistics()["opens"] == 1200


def test_only_one_of_many_threads_finishes_a_plan(pool):
    for _ in range(50):
        sequence = pool.open(ids(*PROMPT), reuse=False)
        plan = Batch(pool, [sequence]).plan()
        start = threading.Barrier(3)
        won = []

        def finish(end, start=start, won=won):
            start.wait()
            try:
                end()
                won.append(end)
            except ClosedError:
                pass

        threads = [
            threading.Thread(target=finish, args=(end,)) for end in (plan.commit, plan.abandon, plan.commit)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        sequence.close()
    pool.check()
    assert held(pool) == (0, 0)


def test_a_long_call_lets_others_run():
    pool = PagePool(4, 16)
    tokens = np.ones(10_000_000, np.int32)
    count = 0
    go, counted, done = threading.Lock(), threading.Lock(), False

    def tick():
        nonlocal count
        while go.acquire() and not done:
            count += 1
            counted.release()

    go.acquire()
    counted.acquire()
    thread = threading.Thread(target=tick)
    thread.start()
    # From here on nobody who holds the interpreter is made to give it up: whoever counts while the
    # call runs was let in by the call.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)
    try:
        moved, tries = 0, 0
        while not moved and tries < 50:
            before = count
            go.release()
            pool.open(tokens)
            moved = count - before
            counted.acquire()
            tries += 1
    finally:
        sys.setswitchinterval(interval)
        done = True
        go.release()
        thread.join()
    assert moved == 1
