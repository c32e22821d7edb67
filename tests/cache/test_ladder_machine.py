"""``process_kv`` on a ladder of pages, against tensors: what is read was written, or stepped down from it.

Every block of every session has a level, how often it stepped down at least; it never comes back up. Codecs
fail and refuse at any step of a plan, and nothing is lost by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvhybrid import KVCache, KVCacheConfig, KVLayout, OutOfMemoryError
from kvhybrid.cache.codec import Codec

BLOCK, HEADS, WIDTH, LAYERS = 16, 1, 4, 2
SIDES = ("k", "v")

names = st.sampled_from("abc")


class CodecFailsError(Exception):
    """Thrown in by the machine."""


def readings(block: torch.Tensor, side: str) -> list[torch.Tensor]:
    """What ``[heads, BLOCK, WIDTH]`` reads as whole, at 8 bits, and at 4 behind them."""
    found = [block]
    for bits in (8, 4):
        codec = Codec(bits)
        size = (codec.key_bytes if side == "k" else codec.value_bytes)(WIDTH, BLOCK)
        record, page = torch.empty((1, HEADS, size), dtype=torch.uint8), found[-1][None].contiguous()
        (codec.quantize_keys if side == "k" else codec.quantize_values)(page, None, record, None)
        (codec.dequantize_keys if side == "k" else codec.dequantize_values)(
            record, None, page := page.clone()
        )
        found.append(page[0])
    return found


@dataclass
class Held:
    """What a session should hold: by layer K and V as they came, and the levels of its whole blocks."""

    layers: list[list[torch.Tensor]]
    levels: list[int] = field(default_factory=list)

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[1]


class LadderMachine(RuleBasedStateMachine):
    """Tiny classes, so that nearly every slice has somebody step down."""

    @initialize(pages=st.integers(7, 24), strategy=st.sampled_from(["paged", "adaptive"]))
    def make(self, pages, strategy):
        layout = KVLayout(num_layers=LAYERS, num_kv_heads=HEADS, head_dim=WIDTH, block_size=BLOCK)
        config = KVCacheConfig(
            max_tokens=pages * BLOCK,
            block_size=BLOCK,
            cache_strategy=strategy,
            use_quantization=True,
            quantization_bits=4,
            _env_file=None,
        )
        self.cache = KVCache(config, layout=layout)
        self.held: dict[str, Held] = {}
        self.numbers = torch.Generator().manual_seed(0)
        self.refused = 0
        # What the codec does next: at which call, and which page of it is refused; None fails.
        self.fault: tuple[int, int | None] | None = None
        quantize = self.cache.storage.quantize

        def faulty(pairs):
            if self.fault is None:
                return quantize(pairs)
            calls, which = self.fault
            self.fault = (calls - 1, which) if calls else None
            if calls:
                return quantize(pairs)
            if which is None:
                raise CodecFailsError
            taken = quantize(pairs)
            taken[which % len(pairs)] = False
            self.refused += 1
            return taken

        self.cache.storage.quantize = faulty

    def store(self, name, count):
        """Store so many tokens in every layer; with no room, or a codec that fails, nothing has changed."""
        new = [
            [torch.randn(HEADS, count, WIDTH, generator=self.numbers) for _ in SIDES] for _ in range(LAYERS)
        ]
        done = []
        try:
            for layer, pair in enumerate(new):
                self.cache.process_kv(*(side[None] for side in pair), layer_idx=layer, session_id=name)
                done.append(layer)
        except CodecFailsError:
            assert not done, "the first layer has every page written"
            return
        except OutOfMemoryError:
            room = self.cache.pool.num_free - self.cache.pool.num_free_quantized
            assert not done, "the first layer finds room for all"
            assert room <= -(-count // BLOCK), "there was room"
            return
        empty = Held([[torch.empty(HEADS, 0, WIDTH) for _ in SIDES] for _ in range(LAYERS)])
        held = self.held.setdefault(name, empty)
        for old, added in zip(held.layers, new, strict=True):
            old[:] = [torch.cat(pair, dim=1) for pair in zip(old, added, strict=True)]
        held.levels += [0] * (held.length // BLOCK - len(held.levels))

    @rule(name=names, count=st.integers(1, 3 * BLOCK))
    def grow(self, name, count):
        self.store(name, count)

    @rule(name=names, count=st.integers(1, 5), calls=st.integers(0, 2), which=st.none() | st.integers(0, 3))
    def grow_past_a_fault(self, name, count, calls, which):
        self.fault = (calls, which)
        for _ in range(count):
            self.store(name, BLOCK)
        self.fault = None

    @rule(name=names, length=st.integers(0, 10 * BLOCK))
    def truncate(self, name, length):
        held = self.held.get(name)
        if held is None or length > held.length:
            return
        self.look(name)
        if length == 0:
            del self.held[name]
        else:
            self.cut(held, length)
        self.cache.truncate_kv(length, session_id=name)

    def cut(self, held, length):
        whole, part = divmod(length, BLOCK)
        if part and whole < len(held.levels):
            # What goes on from here goes on from what is read.
            span = slice(whole * BLOCK, (whole + 1) * BLOCK)
            for pair in held.layers:
                for index, side in enumerate(SIDES):
                    pair[index][:, span] = readings(pair[index][:, span], side)[held.levels[whole]]
        for pair in held.layers:
            pair[:] = [tensor[:, :length] for tensor in pair]
        del held.levels[whole:]

    @rule(name=names)
    def drop(self, name):
        assert self.cache.drop_session(name) == (self.held.pop(name, None) is not None)

    def look(self, name):
        """See that every block is what it was, or less of it, in every layer alike."""
        held = self.held[name]
        reads = [
            self.cache.process_kv(*(side[None] for side in pair), 0, layer_idx=layer, session_id=name)
            for layer, pair in enumerate(held.layers)
        ]
        assert all(metadata["cached"] for *_, metadata in reads)
        pairs = [
            (side, read[0], wrote)
            for (keys, values, _), pair in zip(reads, held.layers, strict=True)
            for side, read, wrote in zip(SIDES, (keys, values), pair, strict=True)
        ]
        for block, known in enumerate(held.levels):
            span = slice(block * BLOCK, (block + 1) * BLOCK)
            may_be = set(range(known, 3))
            for side, read, wrote in pairs:
                same = [torch.equal(read[:, span], it) for it in readings(wrote[:, span], side)]
                may_be &= {level for level, is_it in enumerate(same) if is_it}
            assert may_be, f"block {block} of {name} is not what it was at level {known}, nor below"
            held.levels[block] = min(may_be)
        rest = slice(len(held.levels) * BLOCK, None)
        assert all(torch.equal(read[:, rest], wrote[:, rest]) for _, read, wrote in pairs)

    @invariant()
    def everything_is_there(self):
        for name in self.held:
            self.look(name)

    @invariant()
    def the_books_balance(self):
        if not hasattr(self, "cache"):
            return
        self.cache.pool.check()
        stats = self.cache.get_stats()
        assert stats["refused_pages"] == self.refused
        assert stats["used_bytes"] <= stats["capacity_bytes"]
        levels = [level for held in self.held.values() for level in held.levels]
        assert stats["int4_pages"] >= levels.count(2)
        assert stats["int8_pages"] + stats["int4_pages"] >= sum(level > 0 for level in levels)
        assert stats["mutable_pages"] == sum(-(-held.length // BLOCK) for held in self.held.values())


TestLadder = LadderMachine.TestCase
TestLadder.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
