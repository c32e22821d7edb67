"""The page pool against a naive model of it, driven from Python in every order that a caller could.

Sequences are lists of tokens, pages an array of digests. Whoever fills a plan writes, into every slot
that it was given, a digest of the namespace and of all tokens up to that position, as attention would
write K and V that depend on exactly those. After every step each slot of every open sequence must hold
what it should: a page that was evicted, shared or written too early shows up as a wrong digest.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from pool_books import WAYS, PoolBooks, Text

from kvhybrid._core import CapacityError, PagePool

some = st.integers(0, 7)
texts = st.lists(st.integers(0, 1), max_size=24)
usually = st.integers(0, 9).map(lambda n: n < 9)
ways = st.sampled_from(sorted(WAYS))
namespaces = st.integers(0, 1)
sayings = st.fixed_dictionaries(
    {},
    optional={
        "priority": st.integers(-2, 2),
        "ttl_s": st.none() | st.sampled_from([0, 1e-5, 3e-5, 1]),
        "lapses": st.booleans(),
    },
)
some_rows = st.lists(some, min_size=1, max_size=4)
some_counts = st.none() | st.lists(st.integers(0, 11), min_size=4, max_size=4)


class PoolMachine(PoolBooks):
    """Tiny pools: nearly every plan needs someone to leave."""

    roomy = False

    @initialize(
        pages=st.integers(1, 24),
        block=st.sampled_from([1, 2, 4, 16]),
        keep_tails=st.booleans(),
        policy=st.sampled_from(["lru", "survival"]),
    )
    def make(self, pages, block, keep_tails, policy):
        pages = 4096 if self.roomy else pages
        self.pool = PagePool(pages, block, keep_tails=keep_tails, policy=policy, seed=0)
        self.pool.set_time(self.now)
        self.block = block
        self.keep_tails = keep_tails
        self.memory = np.zeros(pages * block, np.int64)

    # What callers do.

    @rule(
        namespace=namespaces,
        stem=some,
        keep=st.integers(0, 40),
        more=texts,
        reuse=usually,
        share=usually,
        align=st.sampled_from([1, 1, 1, 2, 3, 5]),
        way=ways,
    )
    def open(self, namespace, stem, keep, more, reuse, share, align, way):
        self.start(namespace, stem, keep, more, reuse=reuse, share=share, align=align, way=way)

    @rule(
        namespace=namespaces,
        stem=some,
        keep=st.integers(0, 40),
        more=texts,
        count=st.integers(0, 40),
        drop=st.booleans(),
    )
    def answer(self, namespace, stem, keep, more, count, drop):
        """A whole request in one rule, or too few would ever get that far: prompt, tokens, end."""
        text = self.start(namespace, stem, keep, more)
        for token in (None, *(i % 2 for i in range(count % 5))):
            if step := self.try_step([text], None, token):
                self.finish(step)
        if count < 30:
            self.let_go(text, drop=drop)

    @rule(rows=some_rows, counts=some_counts, token=st.none() | st.integers(0, 1))
    def compute(self, rows, counts, token):
        if step := self.try_plan(rows, counts, token):
            self.finish(step)

    def start(self, namespace, stem, keep, more, *, reuse=True, share=True, align=1, way="int32"):
        tokens = self.texts[-1 - stem % len(self.texts)].tokens[:keep] if self.texts else []
        tokens = tokens + more
        given = WAYS[way](tokens)
        known = self.pool.match(given, namespace)
        handle = self.pool.open(given, namespace, reuse=reuse, share=share, align=align)
        expected = min(known, max(len(tokens) - 1, 0)) // align * align if reuse else 0
        assert handle.cached == expected
        text = Text(handle, namespace, tokens, expected, share)
        self.texts.append(text)
        self.count(opens=1, queried_tokens=len(tokens), cached_tokens=expected)
        return text

    @rule(of=some, more=texts, way=ways)
    def append(self, of, more, way):
        if (text := self.pick(of)) is None:
            return
        if text.planned:
            with pytest.raises(ValueError, match="in an open plan"):
                text.handle.append(WAYS[way](more))
            return
        text.handle.append(WAYS[way](more))
        text.tokens += more
        assert text.buffer.append(WAYS[way](more)) == len(text.tokens)

    @rule(rows=some_rows, counts=some_counts, token=st.none() | st.integers(0, 1), way=ways)
    def plan(self, rows, counts, token, way):
        self.try_plan(rows, counts, token, way)

    @rule(rows=some_rows, token=st.integers(0, 1), drop=st.booleans())
    def plan_and_think_better_of_it(self, rows, token, drop):
        before = self.trace()
        if (step := self.try_plan(rows, None, token)) is not None:
            self.undo(step, drop=drop)
            assert self.trace() == before, "an abandoned plan left a trace"

    @precondition(lambda self: self.steps)
    @rule(of=some)
    def fill(self, of):
        self.write(self.steps[of % len(self.steps)])

    @precondition(lambda self: self.steps)
    @rule(of=some)
    def commit(self, of):
        self.finish(self.steps[of % len(self.steps)])

    @precondition(lambda self: self.steps)
    @rule(of=some, fill_first=st.booleans(), drop=st.booleans())
    def abandon(self, of, fill_first, drop):
        step = self.steps[of % len(self.steps)]
        if fill_first:
            self.write(step)
        self.undo(step, drop=drop)

    @rule(of=some)
    def fork(self, of):
        if (text := self.pick(of)) is None:
            return
        if text.planned:
            with pytest.raises(ValueError, match="in an open plan"):
                text.handle.fork()
            return
        self.texts.append(Text(text.handle.fork(), text.namespace, [*text.tokens], text.length, text.share))

    @rule(of=some, length=st.integers(0, 40))
    def truncate(self, of, length):
        if (text := self.pick(of)) is None:
            return
        if text.planned or length > len(text.tokens):
            with pytest.raises(ValueError, match=r"in an open plan|cannot truncate"):
                text.handle.truncate(length)
            return
        text.handle.truncate(length)
        text.buffer.truncate(length)
        del text.tokens[length:]
        text.length = min(text.length, length)

    @rule(of=some, drop=st.booleans())
    def close(self, of, drop):
        if (text := self.pick(of)) is not None:
            self.let_go(text, drop=drop)

    @precondition(lambda self: not self.roomy)
    @rule(pages=st.integers(0, 6))
    def evict(self, pages):
        expected = min(pages, self.pool.num_evictable)
        assert self.pool.evict(pages) == expected

    @precondition(lambda self: not self.roomy)
    @rule(namespace=namespaces)
    def drop(self, namespace):
        free = self.pool.num_free
        assert self.pool.drop(namespace) == self.pool.num_free - free
        of_it = [text for text in self.texts if text.namespace == namespace]
        if all(text.closed and not text.planned for text in of_it):
            assert all(self.pool.match(text.buffer, namespace) == 0 for text in of_it)

    @rule(of=some, ends=st.tuples(st.integers(0, 40), st.integers(0, 40)), said=sayings)
    def retain(self, of, ends, said):
        if (text := self.pick(of)) is None:
            return
        start, stop = min(ends), max(ends)
        if start > min(stop, len(text.tokens)):
            with pytest.raises(ValueError, match=f"start={start} lies behind"):
                self.pool.retain(text.buffer, text.namespace, start=start, stop=stop, **said)
            return
        known = self.pool.match(np.array(text.tokens[:stop], np.int32), text.namespace)
        reached = self.pool.retain(text.buffer, text.namespace, start=start, stop=stop, **said)
        assert known - self.block < reached <= known

    @rule(of=some, start=st.integers(0, 40), said=sayings)
    def retain_once_closed(self, of, start, said):
        if (text := self.pick(of)) is not None:
            text.handle.retain(start=start, **said)

    @rule(of=some, ttl_s=st.none() | st.sampled_from([0, 1e-5, 1]))
    def pin(self, of, ttl_s):
        if (text := self.pick(of)) is None:
            return
        known = self.pool.match(text.buffer, text.namespace)
        try:
            pin = self.pool.pin(text.buffer, text.namespace, ttl_s=ttl_s)
        except CapacityError as error:
            needed, pinned, most, total = map(int, re.findall(r"\d+", str(error)))
            assert pinned + needed > most
            assert total == self.pool.num_pages
        else:
            assert pin.num_tokens == known
            self.pins.append((pin, text.namespace, np.array(text.tokens[:known], np.int32)))

    @rule(of=some, namespace=namespaces, drop=st.booleans())
    def unpin(self, of, namespace, drop):
        if self.pins:
            pin, *_ = self.pins.pop(of % len(self.pins))
            if not drop:
                pin.release()
                assert not pin.is_held

    @rule(of=some)
    def hint(self, of):
        if (text := self.pick(of)) is None:
            return
        known = self.pool.match(text.buffer, text.namespace)
        most = self.pool.num_pages // 4
        if (pin := self.pool.hint(text.buffer, text.namespace, most_pages=most)) is not None:
            self.hints.append((pin, text.namespace, np.array(text.tokens[:known], np.int32)))

    @rule()
    def forget_hints(self):
        self.hints.clear()

    @rule(microseconds=st.integers(1, 30))
    def wait(self, microseconds):
        self.now += microseconds
        self.pool.set_time(self.now)

    @rule(namespace=namespaces, tokens=texts, way=ways)
    def look(self, namespace, tokens, way):
        self.check_match(self.pool.match(WAYS[way](tokens), namespace), namespace, tokens)

    # What must hold after every step.

    @invariant()
    def the_books_are_in_order(self):
        self.pool.check()
        now = self.pool.statistics()
        assert now["free_pages"] + now["mutable_pages"] + now["sealed_pages"] == self.pool.num_pages
        assert now["pinned_pages"] + now["evictable_pages"] == now["sealed_pages"]
        assert now["free_pages"] == self.pool.num_free
        assert now["evictable_pages"] == self.pool.num_evictable
        assert now["sequences"] == sum(not text.closed or text.planned for text in self.texts)
        assert self.counted.items() <= now.items()

    @invariant()
    def what_is_pinned_stays(self):
        for pin, namespace, tokens in self.pins:
            if pin.is_held:
                assert self.pool.match(tokens, namespace) == len(tokens)
        for hint, namespace, tokens in self.hints:
            if hint.is_held:
                assert self.pool.match(tokens, namespace) == len(tokens)
        now = self.pool.statistics()
        assert now["user_pins"] == sum(pin.is_held for pin, *_ in self.pins)
        assert now["user_pinned_pages"] <= min(now["pinned_pages"], now["most_user_pinned_pages"])
        causes = ("lru", "survival", "ttl", "priority", "asked")
        assert sum(now[f"evicted_{cause}_pages"] for cause in causes) == now["evicted_pages"]

    @invariant()
    def every_slot_holds_what_was_written(self):
        for text in self.texts:
            if text.closed:
                continue
            tokens = np.frombuffer(text.handle.tokens(), np.uint32).tolist()
            assert tokens == text.tokens
            assert text.handle.tokens() == text.buffer.tobytes()
            assert text.handle.length == text.length
            assert text.handle.pending == len(text.tokens) - text.length
            table = self.table(text)
            assert len(table) == text.handle.num_pages == len(set(table))
            if not text.planned:
                assert len(table) == -(-text.length // self.block)
                pages = self.memory.reshape(-1, self.block)[table].ravel()
                chain = self.chain(text.namespace, text.tokens[: text.length])
                assert pages[: text.length].tolist() == chain, f"of {text.tokens}"

    @invariant()
    def nobody_else_sees_a_page_that_a_plan_writes_into(self):
        tables = {text: self.table(text) for text in self.texts if not text.closed}
        for step in self.steps:
            for text, length, count in step.rows:
                if count and not text.closed:
                    writes = set(tables[text][length // self.block :])
                    for other, table in tables.items():
                        assert other is text or writes.isdisjoint(table)

    @invariant()
    def what_is_found_was_stored(self):
        for text in self.texts:
            found = self.pool.match(text.buffer, text.namespace)
            self.check_match(found, text.namespace, text.tokens)
            if text.share and not text.closed:
                assert found >= text.length // self.block * self.block, "a pinned prefix was lost"

    def teardown(self):
        """Let everything go, open plans last, and see that every page comes back."""
        if not hasattr(self, "pool"):
            return
        for step in self.steps[::2]:
            self.finish(step)
        for text in self.texts:
            if not text.closed:
                self.let_go(text, drop=True)
        for step in [*self.steps]:
            self.undo(step, drop=True)
        self.pins.clear()
        self.hints.clear()
        self.pool.check()
        now = self.pool.statistics()
        assert (now["sequences"], now["mutable_pages"], now["pinned_pages"]) == (0, 0, 0)
        evictable = self.pool.num_evictable
        assert self.pool.num_free + evictable == self.pool.num_pages
        assert self.pool.evict(self.pool.num_pages) == evictable
        assert self.pool.num_free == self.pool.num_pages
        assert self.pool.statistics()["nodes"] == 0
        self.pool.check()


class RoomyMachine(PoolMachine):
    """Nothing ever leaves: every stored token must be found."""

    roomy = True


TestWhilePagesAreShort = PoolMachine.TestCase
TestWhileThereIsRoom = RoomyMachine.TestCase
TestWhilePagesAreShort.settings = settings(max_examples=200, stateful_step_count=50)
TestWhileThereIsRoom.settings = settings(max_examples=80, stateful_step_count=50)
