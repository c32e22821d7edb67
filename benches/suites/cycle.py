"""One request's bookkeeping: open on the cached prefix, plan, fill, commit, close."""

import numpy as np

from kvhybrid._core import Batch, PagePool

BLOCK = 16


def cycle(pool, tokens, tables, slots, lengths):
    sequence = pool.open(tokens)
    plan = Batch(pool, [sequence]).plan()
    plan.fill(tables, slots, lengths)
    plan.commit()
    sequence.close()


class Request:
    """The same text again (hot), and a new one every time that pushes an old one out (evicting)."""

    params = (128, 1024, 8192)
    param_names = ("tokens",)

    def setup(self, tokens):
        self.pool = PagePool(4 * tokens // BLOCK, BLOCK)
        self.tokens = np.arange(tokens, dtype=np.int32)
        self.tables = np.empty((1, tokens // BLOCK + 1), np.int32)
        self.slots = np.empty(tokens, np.int32)
        self.lengths = np.empty((1, 2), np.int32)
        cycle(self.pool, self.tokens, self.tables, self.slots, self.lengths)
        self.first = tokens

    def time_hot(self, tokens):
        cycle(self.pool, self.tokens, self.tables, self.slots, self.lengths)

    def time_evicting(self, tokens):
        self.first += 1
        fresh = np.arange(self.first, self.first + tokens, dtype=np.int32)
        cycle(self.pool, fresh, self.tables, self.slots, self.lengths)


class Decode:
    """One token for every running sequence, block tables and slots ready in the caller's buffers."""

    params = (1, 32, 256)
    param_names = ("sequences",)

    def setup(self, sequences):
        context, width = 512, 512 // BLOCK + 256
        self.pool = PagePool(sequences * width, BLOCK)
        opened = [self.pool.open(np.full(context, row, np.int32), share=False) for row in range(sequences)]
        self.batch = Batch(self.pool, opened)
        self.tables = np.empty((sequences, width), np.int32)
        self.lengths = np.empty((sequences, 2), np.int32)
        plan = self.batch.plan()
        plan.fill(self.tables, np.empty(plan.num_tokens, np.int32), self.lengths)
        plan.commit()
        self.opened = opened
        self.context = context
        self.next = np.zeros(sequences, np.int32)
        self.slots = np.empty(sequences, np.int32)

    def time_step(self, sequences):
        plan = self.batch.plan(tokens=self.next)
        plan.fill(self.tables, self.slots, self.lengths)
        plan.abandon()
