"""Attention over pages in Triton against float64 arithmetic, case by case; a program, not a test.

``test_triton.py`` runs it in a process of its own: ``TRITON_INTERPRET`` must be set before Triton is first
imported, and nobody knows who imported it before. Writes what it found to stdout as JSON, by case.
Every slot that holds no token is NaN, and so is every page and record that no row reads.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kvhybrid.cache.pages import PageTable
from kvhybrid.cache.step import Span
from kvhybrid.model.versions import over


@dataclass(frozen=True)
class Case:
    """Rows are ``(past, count)``; ``classes``: bits of each page, by turns, 16 for full precision."""

    rows: tuple[tuple[int, int], ...] = ((37, 1),)
    kv_heads: int = 2
    group: int = 2
    head_dim: int = 16
    value_dim: int = 16
    block: int = 16
    classes: tuple[int, ...] = (16,)
    dtype: str = "float32"
    page_dtype: str = ""
    window: int | None = None
    cap: float | None = None
    sinks: bool = False
    shared: int = 0
    """Pages at the start that rows share."""
    loners: int = 0
    """Rows, the last ones, that share nothing."""
    processors: int = 1
    packed: bool = True
    seed: int = 0


CASES = {
    "one token of one row": Case(),
    "no past": Case(rows=((0, 1),)),
    "parts": Case(rows=((600, 1),), processors=8, block=64),
    "several tokens are causal among them": Case(rows=((37, 4),)),
    "ragged rows": Case(rows=((0, 1), (50, 3), (15, 1), (16, 2))),
    "ragged rows, padded": Case(rows=((0, 1), (50, 3), (15, 1), (16, 2)), packed=False),
    "ragged rows in parts": Case(rows=((700, 1), (3, 2)), processors=16),
    "one head a group": Case(group=1, kv_heads=3),
    "more queries than a program holds": Case(group=16, rows=((21, 5),)),
    "odd head": Case(head_dim=20, value_dim=20),
    "values of another width": Case(head_dim=24, value_dim=40),
    "blocks of one token": Case(block=1, rows=((9, 1),)),
    "blocks of four tokens": Case(block=4, rows=((9, 2), (31, 1))),
    "blocks larger than a tile": Case(block=128, rows=((200, 1),)),
    "window": Case(window=7, rows=((37, 1), (3, 2))),
    "window in parts": Case(window=560, rows=((900, 2),), processors=8, block=64),
    "cap": Case(cap=3.0),
    "sinks": Case(sinks=True),
    "sinks, no past": Case(sinks=True, rows=((0, 1),)),
    "bfloat16": Case(dtype="bfloat16"),
    "float16": Case(dtype="float16"),
    "float16 pages of a float32 model": Case(page_dtype="float16"),
    "8 bits": Case(classes=(8, 8, 16)),
    "4 bits": Case(classes=(4, 4, 16)),
    "full, 8 and 4 bits": Case(classes=(8, 16, 4), rows=((100, 1),)),
    "full, 8 and 4 bits, ragged": Case(classes=(4, 8, 16), rows=((100, 2), (7, 1), (48, 3))),
    "full, 8 and 4 bits, blocks of 64": Case(classes=(8, 4, 16), rows=((200, 1),), block=64),
    "full, 8 and 4 bits, blocks of 128": Case(classes=(8, 4, 16), rows=((400, 1),), block=128),
    "records, odd head": Case(classes=(4, 8), head_dim=20, value_dim=20, rows=((70, 1),)),
    "records, odd values": Case(classes=(4, 8), head_dim=24, value_dim=13, rows=((70, 1),)),
    "records, window": Case(classes=(4, 8), window=21, rows=((70, 2),)),
    "records, cap and sinks": Case(classes=(8, 4), cap=2.0, sinks=True, rows=((70, 1),)),
    "records, bfloat16": Case(classes=(8, 4), dtype="bfloat16", rows=((70, 1),)),
    "records in parts": Case(classes=(8, 4, 16), rows=((900, 1),), block=64, processors=8),
    "shared prefix": Case(rows=((70, 1), (80, 1), (64, 1)), shared=4),
    "shared prefix of some rows": Case(rows=((70, 1), (80, 1), (64, 1)), shared=4, loners=1),
    "shared prefix, ragged": Case(rows=((70, 2), (80, 1), (64, 3)), shared=4, group=3),
    "shared prefix in parts": Case(rows=((700, 1), (650, 2)), shared=10, block=64, processors=8),
    "shared prefix, more queries than a program holds": Case(
        rows=((70, 3),) * 4, shared=4, group=8, kv_heads=1
    ),
    "shared prefix, window": Case(rows=((100, 1), (130, 2)), shared=6, window=90),
    "prefix that a window leaves little of": Case(rows=((70, 1), (90, 2)), shared=4, window=30),
    "shared prefix of records": Case(rows=((90, 1), (100, 1)), shared=5, classes=(8, 4, 4, 16), sinks=True),
    "prefix too short to share": Case(rows=((40, 1), (45, 1)), shared=2),
}


def fuzzed(number: int) -> Case:
    """Return a random case."""
    random.seed(number)
    pick = random.choice
    block = pick([16, 32])
    rows = tuple((random.randrange(90), random.randint(1, 3)) for _ in range(random.randint(1, 4)))
    shared = pick([0, 64 // block])
    return Case(
        rows=tuple((past + shared * block, count) for past, count in rows),
        kv_heads=random.randint(1, 2),
        group=random.randint(1, 5),
        head_dim=random.randint(1, 24),
        value_dim=random.randint(1, 24),
        block=block,
        classes=pick([(16,), (8, 16), (4, 16), (8, 4, 16), (4, 8)]),
        dtype=pick(["float32", "bfloat16", "float16"]),
        window=pick([None, None, random.randint(1, 120)]),
        cap=pick([None, None, 2.5]),
        sinks=pick([False, True]),
        shared=shared,
        processors=pick([1, 4]),
        packed=pick([True, False]),
        seed=number,
    )


@dataclass
class Class:
    """Pages of one format: what is stored, and the same in float64."""

    bits: int
    stored: tuple[torch.Tensor, torch.Tensor]
    exact: tuple[torch.Tensor, torch.Tensor]


def full_pages(case: Case, count: int) -> Class:
    dtype = getattr(torch, case.page_dtype or case.dtype)
    shape = (count, case.kv_heads, case.block)
    stored = tuple(torch.randn(*shape, width).to(dtype) for width in (case.head_dim, case.value_dim))
    return Class(16, stored, tuple(t.double() for t in stored))


def records(case: Case, bits: int, count: int) -> Class:
    """Return random records with their meaning, written down from the format and from nothing of ours."""
    block, dim, value_dim = case.block, case.head_dim, case.value_dim
    lead = (count, case.kv_heads)
    top = 2**bits

    def grid(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        scale = (torch.rand(*lead, length) * 3 / top).half()
        return scale, (-1.5 - torch.rand(*lead, length)).half()

    key = torch.randint(top, (*lead, dim, block), dtype=torch.uint8)
    value = torch.randint(top, (*lead, block, value_dim), dtype=torch.uint8)
    key_scale, key_least = grid(dim)
    value_scale, value_least = grid(block)
    exponent = torch.randint(-1, 4, (*lead, value_dim), dtype=torch.int8)
    keys = key.double() * key_scale.double()[..., None] + key_least.double()[..., None]
    values = value.double() * value_scale.double()[..., None] + value_least.double()[..., None]
    values = values * 2.0 ** exponent.double()[..., None, :]
    if bits == 4:
        key = key[..., : block // 2] | key[..., block // 2 :] << 4
        half = (value_dim + 1) // 2
        value = torch.nn.functional.pad(value, (0, 2 * half - value_dim))
        value = value[..., :half] | value[..., half:] << 4

    def packed(*fields: torch.Tensor) -> torch.Tensor:
        flat = torch.cat([f.contiguous().view(torch.uint8).reshape(*lead, -1) for f in fields], dim=-1)
        return torch.nn.functional.pad(flat, (0, -flat.shape[-1] % 16), value=255).contiguous()

    stored = packed(key, key_scale, key_least), packed(value, value_scale, value_least, exponent)
    return Class(bits, stored, (keys.transpose(-1, -2), values))


class Scene:
    """A case with its pages, its rows and its exact answer."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(case.seed)
        self.case = case
        block = case.block
        totals = [past + count for past, count in case.rows]
        needed = case.shared + sum(-(-total // block) for total in totals) + 2
        bits = sorted({16, *case.classes}, reverse=True)
        self.classes = [full_pages(case, needed) if b == 16 else records(case, b, needed) for b in bits]
        pools = {b: iter((torch.randperm(needed) + i * needed).tolist()) for i, b in enumerate(bits)}

        def take(number: int, total: int) -> int:
            # The page that is being written is full precision.
            is_last = (number + 1) * block >= total
            return next(pools[16 if is_last else case.classes[number % len(case.classes)]])

        shared = [take(number, 10**9) for number in range(case.shared)]
        sharing = len(totals) - case.loners
        commons = [case.shared if index < sharing else 0 for index in range(len(totals))]
        tables = [
            [shared[n] if n < common else take(n, past) for n in range(-(-total // block))]
            for common, (past, _), total in zip(commons, case.rows, totals, strict=True)
        ]
        spans, column = [], 0
        for index, ((past, count), ids) in enumerate(zip(case.rows, tables, strict=True)):
            place = (0, column) if case.packed else (index, index)
            spans.append(Span(*place, count, past, PageTable(torch.tensor(ids))))
            column += count
        self.spans = tuple(spans)
        self.batch = 1 if case.packed else len(spans)
        self.tokens = column if case.packed else max(s.column + s.count for s in spans)
        heads = case.kv_heads * case.group
        dtype = getattr(torch, case.dtype)
        # As models make it: tokens before heads.
        self.query = torch.randn(self.batch, self.tokens, heads, case.head_dim).to(dtype).transpose(1, 2)
        self.sinks = torch.randn(heads).to(dtype) if case.sinks else None
        self.scale = 1.3 / math.sqrt(case.head_dim)
        exact = [torch.cat([c.exact[side] for c in self.classes]) for side in (0, 1)]
        self.expected = [self._attend(span, *(self._text(side, span) for side in exact)) for span in spans]
        self._poison()

    def _text(self, pages: torch.Tensor, span: Span) -> torch.Tensor:
        return pages[span.table.ids].transpose(0, 1).flatten(1, 2)[:, : span.total]

    def _attend(self, span: Span, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        case = self.case
        keys, values = (t.repeat_interleave(case.group, 0) for t in (keys, values))
        query = self.query[span.row, :, span.column : span.column + span.count].double()
        scores = query @ keys.transpose(1, 2) * self.scale
        if case.cap is not None:
            scores = case.cap * torch.tanh(scores / case.cap)
        own = torch.arange(span.past, span.total)[:, None]
        seen = torch.arange(span.total)
        hidden = seen > own
        if case.window is not None:
            hidden |= seen <= own - case.window
        scores = scores.masked_fill(hidden, -math.inf)
        if self.sinks is not None:
            sink = self.sinks.double()[:, None, None].expand(*scores.shape[:2], 1)
            return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ values
        return scores.softmax(-1) @ values

    def _poison(self) -> None:
        """Make NaN of what no row may read: slots behind the last token, pages and records of nobody."""
        used = {int(page) for span in self.spans for page in span.table.ids}
        count = len(self.classes[0].stored[0])
        for index, kind in enumerate(self.classes):
            for page in range(count):
                if index * count + page not in used:
                    for side in kind.stored:
                        side[page] = math.nan if kind.bits == 16 else 255  # of float16 bytes, NaN
        for span in self.spans:
            last = int(span.table.ids[-1])
            for side in self.classes[0].stored:
                side[last, :, (span.total - 1) % self.case.block + 1 :] = math.nan

    def error(self, device: torch.device) -> float:
        """Return the largest error over the largest number; infinite where anything else was written."""
        from kvhybrid.model.triton.decode import LayerPages, Records, launches
        from kvhybrid.model.triton.plan import DecodePlan

        case = self.case
        stored = [(c.bits, *(side.to(device) for side in c.stored)) for c in self.classes]
        pages = LayerPages(*stored[0][1:], tuple(Records(*c) for c in stored[1:]))
        plan = DecodePlan.of(self.spans, case.block, case.window, device)
        marker = 77.0
        shape = (self.batch, self.tokens, self.query.shape[1], case.value_dim)
        out = torch.full(shape, marker, dtype=self.query.dtype, device=device)
        sinks = None if self.sinks is None else self.sinks.to(device)
        self.was_shared = plan.shared is not None
        steps = launches(
            plan, pages, self.query.to(device), out, self.scale,
            window=case.window, cap=case.cap, sinks=sinks, processors=case.processors,
        )  # fmt: skip
        for name in ("parts", "part_sums"):
            steps[-1].arguments[name].fill_(math.nan)
        for launch in steps:
            launch.run()
        worst, out = 0.0, out.cpu()
        for span, expected in zip(self.spans, self.expected, strict=True):
            own = out[span.row, span.column : span.column + span.count]
            found = own.transpose(0, 1).double()
            worst = max(worst, float((found - expected).abs().max() / expected.abs().max()))
            worst = math.inf if found.isnan().any() else worst
            own.fill_(marker)
        return worst if bool((out == marker).all()) else math.inf


def model_error(device: torch.device) -> dict[str, float]:
    """Return how far a model's logits are off in steps of rows that share a prefix, and who attended."""
    from families import make_model, prompt

    from kvhybrid import KVCache, KVCacheConfig
    from kvhybrid._core import Batch
    from kvhybrid.cache.step import Step
    from kvhybrid.model.runner import Packing, Runner
    from kvhybrid.model.triton.attention import TritonAttention

    model = make_model("llama").to(device)
    cache = KVCache.for_model(model, KVCacheConfig(max_tokens=1024, block_size=16, _env_file=None))
    runner = Runner(model, cache.storage, Packing.RAGGED)
    ours, taken = TritonAttention(cache.storage), 0
    # On a CPU it would not choose itself.
    runner._paged._attention.native = ours
    plain = ours.attend

    def attend(*arguments: Any) -> torch.Tensor:
        nonlocal taken
        taken += 1
        return plain(*arguments)

    ours.attend = attend
    beginning = prompt(70, seed=1)[0]
    texts = [torch.cat([beginning, prompt(n, seed=n)[0]]) for n in (9, 12, 5)]
    first = cache.pool.open(beginning.numpy())
    runner.run(step := Step.plan(cache.storage, Batch(cache.pool, [first])), beginning, [9])
    step.commit()
    rows = [cache.pool.open(text.numpy()) for text in texts]
    batch, worst, done = Batch(cache.pool, rows), 0.0, [64, 64, 64]
    for count in (1, 3, 1, 2):
        new = torch.cat([text[at : at + count] for text, at in zip(texts, done, strict=True)])
        step = Step.plan(cache.storage, batch, np.full(3, count, np.int32))
        found = runner.run(step, new, [0, 1, 2])
        step.commit()
        done = [at + count for at in done]
        for row, (text, at) in enumerate(zip(texts, done, strict=True)):
            with torch.no_grad():
                expected = model(input_ids=text[None, :at].to(device)).logits[0, -1]
            worst = max(worst, float((found[row] - expected).abs().max()))
    runner.close()
    return {"error": worst, "taken": taken, "layers": len(cache.layout.kept_layers)}


def quantized_error(device: torch.device) -> dict[str, float]:
    """Return how far logits are off behind a session whose old pages stepped down, told what they hold."""
    from families import make_model, prompt
    from transformers import DynamicCache

    from kvhybrid import KVCacheConfig
    from kvhybrid.cache.kv_cache import KVCache
    from kvhybrid.model.attach import Attachment
    from kvhybrid.model.routes import Route
    from kvhybrid.model.triton.attention import TritonAttention

    model = make_model("llama").to(device)
    config = KVCacheConfig(
        max_tokens=512,
        block_size=16,
        cache_strategy="paged",
        use_quantization=True,
        quantization_bits=4,
        _env_file=None,
    )
    cache = KVCache.for_model(model, config)
    with Attachment(model, cache, Route.PAGED, "test").install() as attachment, torch.no_grad():
        session = cache.session("a")
        model(prompt(300).to(device), **over(session))
        attachment._attention.native = TritonAttention(cache.storage)
        past, ids = DynamicCache(), prompt(3, seed=1).to(device)
        for index, layer in enumerate(session.layers):
            past.update(layer.keys.clone(), layer.values.clone(), index)
        found, expected = (model(ids, **over(held)).logits for held in (session, past))
        table = np.frombuffer(session.rows.rows.sequences[0].block_table(), np.int32)
        at = [sum(page in records for page in table.tolist()) for records in cache.storage.records]
    return {"error": float((found - expected).abs().max()), "int8": at[0], "int4": at[1]}


def teach_bfloat16() -> None:
    """Have Triton's interpreter convert to and multiply bfloat16: it takes it for the uint16 it lies in."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain(self, widened(a), widened(b), *rest)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if to.scalar == bfloat16 and source.dtype.scalar.is_int():
            source = cast(self, source, float32)
        return cast(self, source, to)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = create_dot, cast_impl


def main() -> None:
    fuzz, device = int(sys.argv[1]), torch.device(sys.argv[2])
    if device.type == "cpu":
        teach_bfloat16()
    found = {}
    for name, case in (CASES | {f"random {n}": fuzzed(n) for n in range(fuzz)}).items():
        scene = Scene(case)
        start = time.perf_counter()
        error = scene.error(device)
        found[name] = {"error": error, "shared": scene.was_shared, "dtype": case.dtype}
        sys.stderr.write(f"{time.perf_counter() - start:.2f} s  {error:.2g}  {name}\n")
    json.dump(found | {"model": model_error(device), "quantized": quantized_error(device)}, sys.stdout)


if __name__ == "__main__":
    main()
