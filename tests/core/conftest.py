"""One step over the native core, as the rest of the package takes it."""

from types import SimpleNamespace

import numpy as np
import pytest

from kvhybrid._core import Batch, PagePool


@pytest.fixture
def compute():
    """``compute(pool, sequence, ..., counts=, tokens=)``: plan, fill, commit; what the step was."""

    def step(pool, *sequences, counts=None, tokens=None):
        counts = None if counts is None else np.array(counts, np.int32)
        tokens = None if tokens is None else np.array(tokens, np.int32)
        plan = Batch(pool, sequences).plan(counts, tokens=tokens)
        tables = np.full((len(sequences), plan.max_pages), -1, np.int32)
        slots = np.full(plan.num_tokens, -1, np.int32)
        lengths = np.full((len(sequences), 2), -1, np.int32)
        plan.fill(tables, slots, lengths)
        plan.commit()
        return SimpleNamespace(copies=plan.copies, tables=tables, slots=slots, lengths=lengths)

    return step


@pytest.fixture
def pool():
    return PagePool(8, 4)
