"""Cost of choosing who leaves, with learning on, and how it grows with the number of leaves.

``victim_us_*``: a page made room for, from the choice of the victim to the last of its books, 32 a call;
``victim_alone_us_*`` one a call. ``touch_us``: a block that a text used, when it closes. ``flatness``: a
victim among 300,000 leaves over one among 10,000. Every leaf is a text of one block, so there are as many
leaves as pages. The learned order rules throughout (``survival``: no guard); ``lru_*`` is recency.
``retained_*``: the same pools, every second leaf retained in ten levels: priorities, with and without a time.
cachetools' LRU, whose evictions choose nothing, stands beside where it is installed.
"""

import statistics
import time

import numpy as np
from report import arguments, write_report

from kvhybrid._core import Batch, PagePool

BLOCK = 16
SMALL, LARGE = 10_000, 300_000


def filled(num_pages, policy, seed=0):
    """A pool whose every page is a leaf, some of them used several times."""
    pool = PagePool(num_pages, BLOCK, policy=policy, seed=seed)
    rng = np.random.default_rng(seed)
    for number in range(num_pages):
        store(pool, number)
    for number in rng.zipf(1.3, num_pages // 4) % num_pages:
        pool.open(text(number)).close()
    return pool


def text(number):
    tokens = np.full(BLOCK + 1, number % 2**31, dtype=np.int32)
    tokens[1] = number // 2**16
    return tokens


def store(pool, number):
    sequence = pool.open(text(number))
    Batch(pool, [sequence]).plan(np.array([BLOCK], dtype=np.int32)).commit()
    sequence.close()


def retain_half(pool, num_pages):
    for number in range(0, num_pages, 2):
        ttl_s = 1e6 if number % 4 else None
        pool.retain(text(number)[:BLOCK], priority=number // 2 % 5 - 2, ttl_s=ttl_s)


def victim_us(pool, count, at_once):
    """Microseconds a victim, ``at_once`` to a call: the median call."""
    times = []
    for _ in range(count // at_once):
        began = time.perf_counter()
        left = pool.evict(at_once)
        times.append((time.perf_counter() - began) / left)
    return 1e6 * statistics.median(times)


def touch_us(policy, blocks=1024, rounds=200):
    """Microseconds that closing a text costs for each of its blocks, over what it costs recency."""
    pool = PagePool(4 * blocks, BLOCK, policy=policy, seed=0)
    tokens = np.arange(blocks * BLOCK + 1, dtype=np.int32)
    sequence = pool.open(tokens)
    Batch(pool, [sequence]).plan(np.array([blocks * BLOCK], dtype=np.int32)).commit()
    sequence.close()
    times = []
    for _ in range(rounds):
        sequence = pool.open(tokens)
        began = time.perf_counter()
        sequence.close()
        times.append((time.perf_counter() - began) / blocks)
    return 1e6 * statistics.median(times)


def cachetools_us(num_keys, count):
    try:
        from cachetools import LRUCache
    except ImportError:
        return None
    cache = LRUCache(num_keys)
    for key in range(num_keys):
        cache[key] = key
    began = time.perf_counter()
    for key in range(num_keys, num_keys + count):
        cache[key] = key
    return 1e6 * (time.perf_counter() - began) / count


def main():
    options = arguments(__doc__.splitlines()[0]).parse_args()
    share = 16 if options.quick else 4  # of the pages, that leave
    figures = {}
    for policy, prefix in [("survival", ""), ("lru", "lru_")]:
        for size, name in [(SMALL, "10k"), (LARGE, "300k")]:
            pool = filled(size, policy)
            figures[f"{prefix}victim_us_{name}"] = victim_us(pool, size // share, 32)
            figures[f"{prefix}victim_alone_us_{name}"] = victim_us(pool, size // (2 * share), 1)
            figures[f"{prefix}bytes_a_page_{name}"] = pool.bookkeeping_bytes() / size
        for size, name in [(SMALL, "10k"), (LARGE, "300k")]:
            pool = filled(size, policy)
            retain_half(pool, size)
            figures[f"{prefix}retained_victim_us_{name}"] = victim_us(pool, size // share, 32)
        figures[f"{prefix}flatness"] = figures[f"{prefix}victim_us_300k"] / figures[f"{prefix}victim_us_10k"]
        figures[f"{prefix}touch_us"] = touch_us(policy)
    if (peer := cachetools_us(LARGE, LARGE // share)) is not None:
        figures["cachetools_insert_us_300k"] = peer
    write_report("evict", figures, options.json)


if __name__ == "__main__":
    main()
