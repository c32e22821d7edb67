"""A naive model of the page pool: texts as lists of tokens, pages as an array of digests.

What it expects of a step, of a text that is let go of and of a match. Knows no rules: what happens, in
which order, is for the machine that drives it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from hypothesis.stateful import RuleBasedStateMachine

from kvhybrid._core import Batch, CapacityError, PagePool, TokenBuffer

if TYPE_CHECKING:
    from kvhybrid._core import Pin, Plan, Sequence

# Ways in which tokens come over the boundary.
WAYS = {
    "int32": lambda tokens: np.array(tokens, np.int32),
    "int64": lambda tokens: np.array(tokens, np.int64),
    "uint32": lambda tokens: np.array(tokens, np.uint32),
    "memoryview": lambda tokens: memoryview(np.array(tokens, np.int32)),
    "buffer": lambda tokens: TokenBuffer(np.array(tokens, np.int64)),
}


@dataclass(eq=False)
class Text:
    """What one sequence should be. The handle is gone once it was dropped."""

    handle: Sequence | None
    namespace: int
    tokens: list[int]
    length: int
    share: bool
    buffer: TokenBuffer = field(init=False)
    planned: bool = False
    closed: bool = False

    def __post_init__(self):
        self.buffer = TokenBuffer(np.array(self.tokens, np.uint32))


@dataclass(eq=False)
class Step:
    """An open plan: the rows are a text, its tokens before the step, and those of the step."""

    plan: Plan
    rows: list[tuple[Text, int, int]]
    appended: bool
    filled: bool = False


class PoolBooks(RuleBasedStateMachine):
    """What is known of a pool whose pages are tiny, and how it comes to be known."""

    pool: PagePool
    memory: np.ndarray
    block: int
    keep_tails: bool

    def __init__(self):
        super().__init__()
        self.texts: list[Text] = []
        self.steps: list[Step] = []
        self.digests: dict[tuple[object, int], int] = {}
        # Digests of every prefix that was ever stored, and of those that may have been.
        self.stored: set[int] = set()
        self.perhaps: set[int] = set()
        self.pins: list[tuple[Pin, int, np.ndarray]] = []
        self.hints: list[tuple[Pin, int, np.ndarray]] = []
        self.now = 1
        self.counted = dict.fromkeys(
            ("opens", "queried_tokens", "cached_tokens", "plans", "abandoned_plans", "copied_pages"), 0
        )

    def pick(self, of):
        known = [text for text in self.texts if not text.closed]
        return known[of % len(known)] if known else None

    def count(self, **more):
        for name, number in more.items():
            self.counted[name] += number

    def chain(self, namespace, tokens):
        """The digest of every prefix. Equal only for equal prefixes: they are given out, not hashed."""
        chain, last = [], ("namespace", namespace)
        for token in tokens:
            last = self.digests.setdefault((last, token), len(self.digests) + 1)
            chain.append(last)
        return chain

    def table(self, text):
        return np.frombuffer(text.handle.block_table(), np.int32).tolist()

    def trace(self):
        """What an undone plan must leave as it was."""
        now = self.pool.statistics()
        pages = [now[f"{kind}_pages"] for kind in ("free", "mutable", "sealed", "shared", "pinned")]
        found = [self.pool.match(text.buffer, text.namespace) for text in self.texts]
        running = [text for text in self.texts if not text.closed]
        tables = [(text.handle.length, text.handle.pending, self.table(text)) for text in running]
        return pages, now["nodes"], found, tables

    def try_plan(self, rows, counts, token, way="int32"):
        chosen = dict.fromkeys(text for of in rows if (text := self.pick(of)) is not None)
        return self.try_step([*chosen], counts, token, way)

    def try_step(self, chosen, counts, token, way="int32"):
        more = token is not None
        pending = [len(text.tokens) - text.length + more for text in chosen]
        sizes = pending
        if counts is not None:
            sizes = [count % (most + 1) for count, most in zip(counts, pending, strict=False)]
        touched = [size > 0 or more for size in sizes]
        before = self.trace()
        batch = Batch(self.pool, [text.handle for text in chosen])
        assert len(batch) == len(chosen)
        given = np.array(sizes, np.int32) if counts is not None else None
        try:
            plan = batch.plan(given, tokens=WAYS[way]([token] * len(chosen)) if more else None)
        except CapacityError as error:
            needed, free, evictable, total = map(int, re.findall(r"\d+", str(error)))
            assert needed > free + evictable
            assert (free, evictable) == (self.pool.num_free, self.pool.num_evictable)
            assert total == self.pool.num_pages
        except ValueError:
            assert any(text.planned and touches for text, touches in zip(chosen, touched, strict=True))
        else:
            assert plan.num_tokens == sum(sizes)
            step = Step(plan, [], more)
            for text, size, touches in zip(chosen, sizes, touched, strict=True):
                assert not (text.planned and touches), "planned twice"
                if more:
                    text.tokens.append(token)
                    text.buffer.append(np.array([token], np.int32))
                text.planned |= touches
                step.rows.append((text, text.length, size))
            self.steps.append(step)
            self.count(plans=1)
            return step
        assert self.trace() == before, "a refused plan left a trace"
        return None

    def write(self, step):
        plan, rows = step.plan, len(step.rows)
        # Buffers may be larger than needed: what is over stays as it was.
        tables = np.full((rows + 1, plan.max_pages + 1), -1, np.int32)
        slots = np.full(plan.num_tokens + 1, -1, np.int32)
        lengths = np.full((rows + 1, 2), -1, np.int32)
        plan.fill(tables, slots, lengths)
        pages = self.memory.reshape(-1, self.block)
        if not step.filled:
            for source, destination in plan.copies:
                pages[destination] = pages[source]
        step.filled = True
        place = iter(slots.tolist())
        for (text, length, count), table, row in zip(
            step.rows, tables.tolist(), lengths.tolist(), strict=False
        ):
            assert row == [length, count]
            chain = self.chain(text.namespace, text.tokens)
            for position in range(length, length + count):
                slot = next(place)
                assert slot == table[position // self.block] * self.block + position % self.block
                self.memory[slot] = chain[position]
            used = -(-(length + count) // self.block) if count else 0
            assert table[used:] == [-1] * (len(table) - used), "wrote past a row's table"
            if count and not text.closed:
                assert table[:used] == self.table(text)
        assert list(place) == [-1]
        assert (tables[rows:] == -1).all()
        assert (lengths[rows:] == -1).all()

    def finish(self, step):
        if not step.filled:
            self.write(step)
        self.steps.remove(step)
        step.plan.commit()
        self.count(copied_pages=len(step.plan.copies))
        for text, length, count in step.rows:
            if count or step.appended:
                text.planned = False
                text.length = length + count
                if text.share:
                    full = text.length // self.block * self.block
                    self.stored.update(self.chain(text.namespace, text.tokens[:full]))

    def undo(self, step, *, drop):
        self.steps.remove(step)
        if drop:
            step.plan = None  # the only reference
        else:
            step.plan.abandon()
        self.count(abandoned_plans=1)
        for text, _, count in step.rows:
            if step.appended:
                text.tokens.pop()
                text.buffer.truncate(len(text.tokens))
            if count or step.appended:
                text.planned = False

    def let_go(self, text, *, drop):
        """Close. The last, partly filled block stays behind when nobody else holds its page."""
        if self.keep_tails and text.share:
            if text.planned:
                # It goes when the plan is finished, with or without the plan's tokens.
                self.perhaps.update(self.chain(text.namespace, text.tokens))
            elif text.length:
                page = self.table(text)[-1]
                others = (other for other in self.texts if other is not text)
                held = any(
                    other.planned if other.closed else page in self.table(other) for other in others
                ) or any(page == source for step in self.steps for source, _ in step.plan.copies)
                into = self.perhaps if held else self.stored
                into.update(self.chain(text.namespace, text.tokens[: text.length]))
        handle, text.handle, text.closed = text.handle, None, True
        if not drop:
            handle.close()
            assert handle.closed

    def check_match(self, found, namespace, tokens):
        chain = self.chain(namespace, tokens)
        least = next((i for i, digest in enumerate(chain) if digest not in self.stored), len(chain))
        known = self.stored | self.perhaps
        most = next((i for i, digest in enumerate(chain) if digest not in known), len(chain))
        assert found <= most, f"found {found} of {most} tokens ever stored"
        condemned = any(step.plan.num_evicted for step in self.steps)
        if not condemned and not self.pool.statistics()["evicted_pages"]:
            assert found >= least, f"found {found} of {least} tokens and nothing was evicted"
