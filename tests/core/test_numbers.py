"""Numbers at the edges of every argument: taken for what they say or refused, and nothing has changed."""

import numpy as np
import pytest

from kvhybrid import KVHybridError
from kvhybrid._core import Batch, PagePool, TokenBuffer

EDGES = [
    -(2**63),
    -1,
    0,
    1,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**64,
    2**70,
]
TOKENS = np.arange(40, dtype=np.int32)
REFUSED = (KVHybridError, ValueError, OverflowError, IndexError, MemoryError)


def served():
    """Return a pool with a cached text, and a sequence that stands on it."""
    pool = PagePool(32, 8, num_quantized=16, num_lowest=4, policy="adaptive", seed=1)
    sequence = pool.open(TOKENS)
    Batch(pool, [sequence]).plan().commit()
    return pool, sequence


CALLS = {
    "match": lambda pool, sequence, edge: pool.match(TOKENS, edge),
    "open": lambda pool, sequence, edge: pool.open(TOKENS, edge).close(),
    "open aligned": lambda pool, sequence, edge: pool.open(TOKENS, align=edge).close(),
    "retain from": lambda pool, sequence, edge: pool.retain(TOKENS, start=edge),
    "retain to": lambda pool, sequence, edge: pool.retain(TOKENS, stop=edge),
    "retain as": lambda pool, sequence, edge: pool.retain(TOKENS, priority=edge),
    "retain for": lambda pool, sequence, edge: pool.retain(TOKENS, ttl_s=float(edge)),
    "pin for": lambda pool, sequence, edge: pool.pin(TOKENS, ttl_s=float(edge)).release(),
    "hint": lambda pool, sequence, edge: pool.hint(TOKENS, most_pages=edge),
    "demote": lambda pool, sequence, edge: pool.demote(edge).abandon(),
    "explain": lambda pool, sequence, edge: pool.explain(TOKENS, edge),
    "evict": lambda pool, sequence, edge: pool.evict(edge),
    "drop": lambda pool, sequence, edge: pool.drop(edge),
    "set time": lambda pool, sequence, edge: pool.set_time(edge),
    "which exist": lambda pool, sequence, edge: pool.which_exist(np.array([edge], np.int64)),
    "share up to": lambda pool, sequence, edge: sequence.share_up_to(edge),
    "verify": lambda pool, sequence, edge: sequence.verify(edge),
    "freeze": lambda pool, sequence, edge: sequence.freeze(edge),
    "truncate": lambda pool, sequence, edge: sequence.truncate(edge),
    "retain sequence from": lambda pool, sequence, edge: sequence.retain(start=edge),
    "retain sequence as": lambda pool, sequence, edge: sequence.retain(edge),
    "retain sequence for": lambda pool, sequence, edge: sequence.retain(ttl_s=float(edge)),
    "append": lambda pool, sequence, edge: sequence.append(np.array([edge], np.int64)),
    "plan": lambda pool, sequence, edge: Batch(pool, [sequence]).plan(np.array([edge], np.int32)).abandon(),
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_edges_are_taken_or_refused(call, edge):
    pool, sequence = served()
    try:
        call(pool, sequence, edge)
    except REFUSED:
        pool.check()
    sequence.close()  # what was said of it comes true now
    pool.check()
    again = pool.open(TOKENS)
    Batch(pool, [again]).plan().commit()
    again.close()
    pool.evict(48)
    pool.check()


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", ["num_pages", "block_size", "num_quantized", "num_lowest", "seed"])
def test_no_pool_is_made_of_numbers_that_make_none(name, edge):
    if name in ("num_pages", "num_quantized") and 2**20 < edge < 2**33:
        pytest.skip("a pool that fits into memory")
    options = {"num_pages": 8, "block_size": 8, "num_quantized": 0, "num_lowest": 0, name: edge}
    try:
        pool = PagePool(**options)
    except REFUSED:
        return
    assert pool.num_pages >= 0


@pytest.mark.parametrize("edge", EDGES)
def test_token_buffers_at_their_edges(edge):
    buffer = TokenBuffer(TOKENS)
    for call in (
        lambda: buffer.tobytes(edge),
        lambda: buffer.tobytes(0, edge),
        lambda: buffer.tobytes(edge, edge),
        lambda: buffer.truncate(edge),
    ):
        try:
            call()
        except REFUSED:
            assert len(buffer) in (0, 1, 40)


@pytest.mark.parametrize("policy", ["lru", "adaptive", "survival"])
def test_pools_live_on_at_the_end_of_time(policy):
    pool = PagePool(16, 8, policy=policy, seed=1)
    for time in (2**32 - 2, 2**53, 2**63 - 1, 2**64 - 3, 2**64 - 1):
        pool.set_time(time)
        for step in range(12):
            sequence = pool.open(TOKENS + step)
            sequence.retain(5, 3600.0)
            Batch(pool, [sequence]).plan().commit()
            sequence.close()
            pool.check()
