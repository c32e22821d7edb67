"""Small steps over the native core, for the tests of its boundary."""

import numpy as np

from kvhybrid._core import Batch

PROMPT = [1, 2, 3, 4, 5, 6, 7]
LONG = 300_000  # past what is worked on without letting go of the interpreter


def ids(*tokens):
    return np.array(tokens, np.int32)


def plan_one(pool, prompt, *counts, **appended):
    """Plan a step of one new sequence."""
    sequence = pool.open(ids(*prompt))
    return Batch(pool, [sequence]).plan(*counts, **appended)


def held(pool):
    """Pages that a sequence or an open plan holds, and the sequences."""
    now = pool.statistics()
    return now["mutable_pages"] + now["pinned_pages"], now["sequences"]
