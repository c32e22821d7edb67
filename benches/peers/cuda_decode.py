"""Attention of one decode step on a GPU: our Triton kernels against torch's over contiguous K and V.

One Llama-8B-shaped layer (8 KV heads of 128, 32 query heads, bfloat16). ``full``, ``int8`` and ``int4`` read
pages, the newest always full precision; ``sdpa`` is torch over K and V as they lie in a DynamicCache,
``dynamic`` the same with the step's token appended as that cache does it, ``torch_paged`` our pages without
Triton. Several layers' worth is read by turns, so that nothing comes from the device's cache. Launching is in
the time, as it is in a model's. ``shared_8``: eight rows over one prefix.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

import torch
from bench_model import interleaved
from report import arguments, write_report
from torch.nn import functional

from kvhybrid.cache.codec import Codec
from kvhybrid.cache.pages import PageStorage, PageTable
from kvhybrid.cache.step import Span, Step
from kvhybrid.layout import KVLayout

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvhybrid.model.triton.decode import LayerPages

KV_HEADS, GROUP, DIM, BLOCK = 8, 4, 128, 64
CONTEXTS = {"512": 512, "2k": 2048, "8k": 8192, "32k": 32768}
# More than the device's own cache holds, so that every read comes from memory.
READ_BYTES = 2**28
# bfloat16 and the codes' own rounding.
TOLERANCE = {"full": 0.02, "sdpa": 0.02, "torch_paged": 0.02, "dynamic": 0.02, "int8": 0.05, "int4": 0.5}


class NoPlan:
    """A step that nobody commits."""


class Scene(NamedTuple):
    """Rows of one length over the pages of several layers."""

    storage: PageStorage
    step: Step
    spans: dict[str, tuple[Span, ...]]
    pages: dict[str, list[LayerPages]]


def make(context: int, rows: int, device: torch.device, layers: int, *, shared: bool = False) -> Scene:
    """Fill pages of ``layers`` layers, and their records; the rows differ in their last page at least."""
    from kvhybrid.model.triton.decode import LayerPages, Records

    whole = context // BLOCK
    own = 1 if shared else whole + 1
    num_pages = rows * own + (whole if shared else 0)
    layout = KVLayout(
        num_layers=layers, num_kv_heads=KV_HEADS, head_dim=DIM, block_size=BLOCK, dtype="bfloat16"
    )
    storage = PageStorage(layout, num_pages, device)
    for pool in (*storage.keys, *storage.values):
        pool.normal_()
    order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(0))
    prefix, order = (order[:whole], order[whole:]) if shared else (order[:0], order)
    tables = [torch.cat([prefix, order[row * own : (row + 1) * own]]) for row in range(rows)]
    spans = tuple(Span(row, 0, 1, context, PageTable(table)) for row, table in enumerate(tables))
    slots = torch.tensor([int(table[-1]) * BLOCK for table in tables])
    step = Step(storage, NoPlan(), spans, slots)
    full = [LayerPages(k, v) for k, v in zip(storage.keys, storage.values, strict=True)]
    pages, placed = {"full": full}, {"full": spans}
    for name, bits in (("int8", 8), ("int4", 4)):
        codec, quantized = Codec(bits), []
        for each in full:
            room = [
                torch.empty(num_pages, KV_HEADS, size(DIM, BLOCK), dtype=torch.uint8, device=device)
                for size in (codec.key_bytes, codec.value_bytes)
            ]
            codec.quantize_keys(each.keys, None, room[0], None)
            codec.quantize_values(each.values, None, room[1], None)
            quantized.append(LayerPages(each.keys, each.values, (Records(bits, *room),)))
        pages[name] = quantized
        # A record lies at its page's own number, behind the full pages.
        moved = [torch.cat([table[:-1] + num_pages, table[-1:]]) for table in tables]
        placed[name] = tuple(Span(row, 0, 1, context, PageTable(ids)) for row, ids in enumerate(moved))
    return Scene(storage, step, placed, pages)


def calls_of(scene: Scene, query: torch.Tensor) -> dict[str, Callable[[int], torch.Tensor]]:
    """Return each way to attend, ``layer -> [rows, heads, 1, head_dim]``."""
    from kvhybrid.model.attention import PagedAttention
    from kvhybrid.model.triton.decode import decode
    from kvhybrid.model.triton.plan import DecodePlan

    storage, step, device = scene.storage, scene.step, query.device
    rows, scale = query.shape[0], DIM**-0.5
    contiguous = []
    for layer in range(storage.layout.num_layers):
        sides = []
        for pool in (storage.keys[layer], storage.values[layer]):
            text = [pool[span.table.ids.to(device)].transpose(0, 1).flatten(1, 2) for span in step.spans]
            sides.append(torch.stack(text)[:, :, : step.spans[0].total].contiguous())
        contiguous.append(sides)
    plain = PagedAttention(storage)
    plain.native = None  # torch's part of it alone

    def ours(name: str) -> Callable[[int], torch.Tensor]:
        plan = DecodePlan.of(scene.spans[name], BLOCK, None, device)

        def call(layer: int) -> torch.Tensor:
            out = torch.empty(rows, 1, KV_HEADS * GROUP, DIM, dtype=query.dtype, device=device)
            decode(plan, scene.pages[name][layer], query, out, scale)
            return out.transpose(1, 2)

        return call

    def sdpa(layer: int) -> torch.Tensor:
        return functional.scaled_dot_product_attention(query, *contiguous[layer], enable_gqa=True)

    def dynamic(layer: int) -> torch.Tensor:
        sides = [torch.cat([side[:, :, :-1], side[:, :, -1:]], dim=2) for side in contiguous[layer]]
        return functional.scaled_dot_product_attention(query, *sides, enable_gqa=True)

    def torch_paged(layer: int) -> torch.Tensor:
        new = [side[:, :, -1:] for side in contiguous[layer]]
        return plain.attend(step, layer, query, *new, scale).transpose(1, 2)

    named = {name: ours(name) for name in scene.pages}
    return named | {"sdpa": sdpa, "dynamic": dynamic, "torch_paged": torch_paged}


def measure(context: int, rows: int, rounds: int, device: torch.device, *, shared: bool) -> dict[str, float]:
    """Return the median seconds of one layer's attention for each way, all answers checked first."""
    layers = max(2, READ_BYTES // (rows * context * KV_HEADS * DIM * 4))
    torch.manual_seed(0)
    scene = make(context, rows, device, layers, shared=shared)
    query = torch.randn(rows, KV_HEADS * GROUP, 1, DIM, device=device).bfloat16()
    calls = calls_of(scene, query)
    expected = calls["sdpa"](0).float()
    for way, call in calls.items():
        off = float((call(0).float() - expected).abs().max() / expected.abs().max())
        if not off < TOLERANCE[way]:
            raise SystemExit(f"{way} differs from torch's attention by {off:.2g} of its largest number")

    def turn(call: Callable[[int], torch.Tensor]) -> Callable[[], None]:
        def all_layers() -> None:
            for layer in range(layers):
                call(layer)
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return all_layers

    turns = {way: turn(call) for way, call in calls.items()}
    interleaved(turns, 2)
    return {way: seconds / layers for way, seconds in interleaved(turns, rounds).items()}


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device", file=sys.stderr if options.json == "-" else sys.stdout)
        return
    device = torch.device("cuda")
    print(torch.cuda.get_device_name(device), file=sys.stderr)
    contexts = {"512": 512, "8k": 8192} if options.quick else CONTEXTS
    rounds = 5 if options.quick else 30
    figures: dict[str, float] = {}
    for label, context in contexts.items():
        for rows in (1, 8):
            seconds = measure(context, rows, rounds, device, shared=False)
            for way in ("full", "int8", "int4"):
                for peer in ("sdpa", "dynamic", "torch_paged"):
                    figures[f"rows{rows}_{label}_{way}_vs_{peer}"] = seconds[way] / seconds[peer]
            figures |= {f"rows{rows}_{label}_{way}_us": value * 1e6 for way, value in seconds.items()}
    alone = measure(8192, 1, rounds, device, shared=False)
    together = measure(8192, 8, rounds, device, shared=True)
    for way in ("full", "int8", "int4"):
        figures[f"shared_8_vs_1_{way}"] = together[way] / alone[way]
    write_report("cuda_decode", figures, options.json)


if __name__ == "__main__":
    main()
