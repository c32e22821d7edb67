"""``process_kv`` against a dictionary of tensors, in every order, in a budget that is often too small."""

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvhybrid import InvalidRequestError, KVCache, KVCacheConfig, KVLayout, LayoutError, OutOfMemoryError
from kvhybrid._core import Batch

LAYERS, HEADS, WIDTH, VALUE_WIDTH = 3, 2, 2, 3

names = st.sampled_from("abc")
layers = st.integers(0, LAYERS - 1)


class ProcessKvMachine(RuleBasedStateMachine):
    """A session is, by layer, the K and V that it should hold."""

    @initialize(
        pages=st.integers(1, 24),
        block=st.sampled_from([1, 2, 4, 8]),
        dtype=st.sampled_from(["float32", "float16"]),
    )
    def make(self, pages, block, dtype):
        layout = KVLayout(
            num_layers=LAYERS,
            num_kv_heads=HEADS,
            head_dim=WIDTH,
            value_head_dim=VALUE_WIDTH,
            dtype=dtype,
            block_size=block,
        )
        config = KVCacheConfig(max_tokens=pages * block, block_size=block, _env_file=None)
        self.cache = KVCache(config, layout=layout)
        self.block, self.pages = block, pages
        self.held: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.next = 0

    def fresh(self, batch, tokens, width):
        """Numbers that no other slice holds, exact in every storage dtype that is used."""
        count = batch * HEADS * tokens * width
        numbers = torch.arange(self.next, self.next + count) % 2048
        self.next += count
        return numbers.float().view(batch, HEADS, tokens, width)

    def pages_for(self, batch, length):
        return batch * -(-length // self.block)

    def longest(self, name):
        return max((keys.shape[2] for keys, _ in self.held.get(name, [])), default=0)

    @rule(
        name=names,
        layer=layers,
        tokens=st.integers(1, 12),
        batch=st.integers(1, 2),
        back=st.none() | st.integers(-2, 12),
        as_tensor=st.booleans(),
    )
    def process(self, name, layer, tokens, batch, back, as_tensor):
        key, value = self.fresh(batch, tokens, WIDTH), self.fresh(batch, tokens, VALUE_WIDTH)
        empty = (key[:, :, :0], value[:, :, :0])
        held = self.held.get(name, [empty] * LAYERS)
        past = held[layer][0].shape[2]
        start = past if back is None else max(past - back, 0)
        position = None if back is None else start
        if as_tensor and position is not None:
            position = torch.arange(start, start + tokens)
        end = start + tokens
        grown = max(end - self.longest(name), 0)
        needed = self.pages_for(batch, self.longest(name) + grown) - self.pages_for(batch, self.longest(name))
        room = self.cache.pool.num_free + self.cache.pool.num_evictable
        call = lambda: self.cache.process_kv(key, value, position, layer_idx=layer, session_id=name)  # noqa: E731
        if name in self.held and held[0][0].shape[0] != batch:
            self.refused(call, LayoutError)
        elif start > past:
            self.refused(call, InvalidRequestError)
        elif needed > room:
            self.refused(call, OutOfMemoryError)
        else:
            free = self.cache.pool.num_free
            new = slice(min(past - start, tokens), None)
            whole = tuple(
                torch.cat([old, added[:, :, new]], dim=2)
                for old, added in zip(held[layer], (key, value), strict=True)
            )
            *found, metadata = call()
            assert all(torch.equal(a, b[:, :, :end]) for a, b in zip(found, whole, strict=True))
            stored = max(end - past, 0)
            assert metadata["cached"] == (stored == 0)
            assert (metadata["position"], metadata["tokens"]) == (start, stored)
            assert metadata["evicted"] == max(needed - free, 0)
            self.held[name] = [*held[:layer], whole, *held[layer + 1 :]]

    def refused(self, call, error):
        before = self.cache.get_stats()
        try:
            call()
        except error:
            after = self.cache.get_stats()
            for counter in ("free_pages", "evictable_pages", "sequences", "sessions", "evicted_pages"):
                assert after[counter] == before[counter], counter
        else:
            raise AssertionError(f"not refused with {error.__name__}")

    @rule(name=names, length=st.integers(0, 20))
    def truncate(self, name, length):
        if name not in self.held or length > self.longest(name):
            self.refused(lambda: self.cache.truncate_kv(length, session_id=name), InvalidRequestError)
            return
        self.cache.truncate_kv(length, session_id=name)
        cut = [(keys[:, :, :length], values[:, :, :length]) for keys, values in self.held.pop(name)]
        if length:
            self.held[name] = cut

    @rule(name=names)
    def drop(self, name):
        assert self.cache.drop_session(name) == (self.held.pop(name, None) is not None)

    @rule(first=st.integers(0, 3), tokens=st.integers(1, 30))
    def cache_a_prefix(self, first, tokens):
        """What may leave: pages that came with tokens."""
        tokens = min(tokens, self.cache.pool.num_free * self.block)
        if tokens:
            sequence = self.cache.pool.open(np.arange(first * 1000, first * 1000 + tokens))
            if -(-tokens // self.block) <= self.cache.pool.num_free:
                Batch(self.cache.pool, [sequence]).plan().commit()
            sequence.close()

    @invariant()
    def everything_is_there(self):
        for name, held in self.held.items():
            for layer, (keys, values) in enumerate(held):
                if keys.shape[2]:
                    found = self.cache.process_kv(keys, values, 0, layer_idx=layer, session_id=name)
                    assert found[2]["cached"]
                    assert torch.equal(found[0], keys)
                    assert torch.equal(found[1], values)

    @invariant()
    def the_books_balance(self):
        if not hasattr(self, "cache"):
            return
        self.cache.pool.check()
        stats = self.cache.get_stats()
        assert stats["sessions"] == len(self.held)
        owned = sum(
            self.pages_for(held[0][0].shape[0], self.longest(name)) for name, held in self.held.items()
        )
        assert stats["mutable_pages"] == owned
        assert stats["used_bytes"] <= stats["capacity_bytes"]


TestProcessKv = ProcessKvMachine.TestCase
TestProcessKv.settings = settings(max_examples=60, stateful_step_count=30)
