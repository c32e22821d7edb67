"""Bookkeeping cost of one request, from Python: the calls that the engine makes, and nothing else.

A full cycle is open (match) + plan (reserve) + fill + commit (seal) + close (free) with the prompt
in a numpy array and the step's buffers allocated once. A pool of 65,536 pages of 16 tokens, token
ids uniformly random; the garbage collector is frozen. Figures are medians in microseconds.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle as endlessly

import numpy as np
from report import arguments, write_report

from kvhybrid import _core

NUM_PAGES = 65_536
BLOCK_SIZE = 16
LENGTHS = (128, 1_024, 8_192, 32_768)
FILL_LENGTH = 4_096

Array = np.ndarray
Figures = dict[str, float]


class Step:
    """The buffers of a step, as an engine holds them, and the cycle over them."""

    def __init__(self, pool: _core.PagePool, rows: int, tokens: int, pages: int) -> None:
        self.pool = pool
        self.batch = _core.Batch(pool)
        self.tables = np.zeros((rows, pages), np.int32)
        self.slots = np.zeros(tokens, np.int32)
        self.lengths = np.zeros((rows, 2), np.int32)

    def request(self, prompt: Array) -> None:
        """Take one prompt through the pool."""
        batch = self.batch
        sequence = self.pool.open(prompt)
        batch.add(sequence)
        plan = batch.plan()
        plan.fill(self.tables, self.slots, self.lengths)
        plan.commit()
        batch.remove(sequence)
        sequence.close()


def step_for(pool: _core.PagePool, longest: int) -> Step:
    return Step(pool, 1, longest, longest // BLOCK_SIZE)


def prompts(rng: np.random.Generator, count: int, length: int) -> list[Array]:
    """Return prompts nobody has seen: rows of one array, so that making them costs little."""
    return list(rng.integers(1_000, 128_000, (count, length), dtype=np.uint32))


def measure(calls: Iterator[Callable[[], object]]) -> list[float]:
    """Time each call on its own, in microseconds, with the collector frozen."""
    clock = time.perf_counter_ns
    times = []
    gc.collect()
    gc.freeze()
    gc.disable()
    for call in calls:
        start = clock()
        call()
        times.append((clock() - start) / 1_000)
    gc.enable()
    gc.unfreeze()
    return times


def requests(step: Step, prompts: list[Array]) -> Iterator[Callable[[], None]]:
    return (lambda prompt=prompt: step.request(prompt) for prompt in prompts)  # type: ignore[misc]


def timer_cost() -> float:
    """What timing costs by itself: subtracted from nothing, reported so that nobody wonders."""
    return statistics.median(measure((lambda: None) for _ in range(10_000)))


def fill_pool(pool: _core.PagePool, rng: np.random.Generator, length: int) -> None:
    """Fill every page with prompts of one length."""
    step = step_for(pool, length)
    while pool.num_free:
        for prompt in prompts(rng, 64, length):
            step.request(prompt)


def repetitions(length: int, quick: bool) -> int:
    return max(20, (200_000 if quick else 1_000_000) // length)


def hot(figures: Figures, rng: np.random.Generator, quick: bool) -> None:
    """Everything cached: the same prompts again and again."""
    for length in LENGTHS:
        pool = _core.PagePool(NUM_PAGES, BLOCK_SIZE)
        step = step_for(pool, length)
        known = prompts(rng, 16, length)
        for prompt in known:
            step.request(prompt)
        again = [
            prompt for prompt, _ in zip(endlessly(known), range(repetitions(length, quick)), strict=False)
        ]
        before = pool.statistics()["cached_tokens"]
        figures[f"hot_{length}_us"] = statistics.median(measure(requests(step, again)))
        assert pool.statistics()["cached_tokens"] - before == len(again) * (length - 1)


def cold(figures: Figures, rng: np.random.Generator, quick: bool) -> None:
    """Nothing cached and room free: an empty pool, filled to a half at most, then emptied again."""
    for length in LENGTHS:
        pool = _core.PagePool(NUM_PAGES, BLOCK_SIZE)
        step = step_for(pool, length)
        times: list[float] = []
        per_round = NUM_PAGES * BLOCK_SIZE // 2 // length
        while len(times) < repetitions(length, quick):
            times += measure(requests(step, prompts(rng, per_round, length)))
            assert pool.statistics()["evicted_pages"] == 0 or pool.num_free
            pool.evict(NUM_PAGES)
        figures[f"cold_{length}_us"] = statistics.median(times)


def evicting(figures: Figures, rng: np.random.Generator, quick: bool) -> None:
    """Nothing cached and the pool full: each new page takes the oldest one's place."""
    pool = _core.PagePool(NUM_PAGES, BLOCK_SIZE)
    fill_pool(pool, rng, FILL_LENGTH)
    for length in LENGTHS:
        step = step_for(pool, length)
        before = pool.statistics()["evicted_pages"]
        count = repetitions(length, quick)
        figures[f"evicting_{length}_us"] = statistics.median(
            measure(requests(step, prompts(rng, count, length)))
        )
        assert pool.statistics()["evicted_pages"] - before >= count * (length // BLOCK_SIZE) - pool.num_free


def victims(figures: Figures, rng: np.random.Generator, quick: bool) -> None:
    """One victim a call among 300,000 leaves of one block each."""
    leaves = 300_000
    pool = _core.PagePool(leaves + 1_000, BLOCK_SIZE)
    step = step_for(pool, BLOCK_SIZE)
    for _ in range(leaves // 10_000):
        for prompt in prompts(rng, 10_000, BLOCK_SIZE):
            step.request(prompt)
    assert pool.num_evictable == leaves
    figures["bytes_per_single_block_leaf"] = pool.bookkeeping_bytes() / leaves
    count = 5_000 if quick else 50_000
    figures["victim_us"] = statistics.median(measure((lambda: pool.evict(1)) for _ in range(count)))
    start = time.perf_counter_ns()
    evicted = pool.evict(leaves // 2)
    figures["victim_in_bulk_us"] = (time.perf_counter_ns() - start) / 1_000 / evicted


def decode(figures: Figures, rng: np.random.Generator, quick: bool) -> None:
    """One token more for each of 256 sequences of 2,048 tokens: plan, fill and commit."""
    rows, length = 256, 2_048
    pool = _core.PagePool(NUM_PAGES, BLOCK_SIZE)
    steps = 200 if quick else 1_000
    step = Step(pool, rows, rows * length, (length + steps) // BLOCK_SIZE + 1)
    running = [pool.open(prompt) for prompt in prompts(rng, rows, length)]
    for sequence in running:
        step.batch.add(sequence)
    plan = step.batch.plan()
    plan.fill(step.tables, step.slots, step.lengths)
    plan.commit()
    sampled = rng.integers(1_000, 128_000, rows, dtype=np.int32)

    def one_step() -> None:
        plan = step.batch.plan(tokens=sampled)
        plan.fill(step.tables, step.slots, step.lengths)
        plan.commit()

    times = measure(one_step for _ in range(steps))
    figures["decode_256_us"] = statistics.median(times)
    figures["decode_256_mean_us"] = statistics.fmean(times)
    figures["decode_256_p99_us"] = statistics.quantiles(times, n=100)[-1]


def memory(figures: Figures, rng: np.random.Generator) -> None:
    """What the bookkeeping owns for each cached block, token ids not counted."""
    pool = _core.PagePool(NUM_PAGES, BLOCK_SIZE)
    fill_pool(pool, rng, FILL_LENGTH)
    figures["bytes_per_block"] = pool.bookkeeping_bytes() / pool.statistics()["sealed_pages"]


def main() -> None:
    """Measure and report."""
    options = arguments(__doc__ or "").parse_args()
    rng = np.random.default_rng(7)
    figures: Figures = {"timer_us": timer_cost()}
    hot(figures, rng, options.quick)
    cold(figures, rng, options.quick)
    evicting(figures, rng, options.quick)
    victims(figures, rng, options.quick)
    decode(figures, rng, options.quick)
    memory(figures, rng)
    write_report("cycle", figures, options.json)


if __name__ == "__main__":
    main()
