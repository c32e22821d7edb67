"""Attention alone, of one decoded token: one layer of Llama-8B's shape, and sequences that share a prefix.

The layer against torch's SDPA as transformers calls it and with the query group folded into the query axis,
over contiguous K and V, and against the machine's own read bandwidth. What is shared: all layers of the bench
model in turn, so that K and V come from memory as they do in a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from bench_model import DTYPES, interleaved
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvhybrid import KVLayout
from kvhybrid._core import Batch, PagePool
from kvhybrid.cache.pages import PageStorage
from kvhybrid.cache.step import Step
from kvhybrid.model.attention import PagedAttention

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 64


class Shape(NamedTuple):
    """Of a model's attention."""

    layers: int
    heads: int
    kv_heads: int
    dim: int


LLAMA_8B = Shape(1, 32, 8, 128)
BENCH = Shape(8, 8, 4, 64)


class Paged:
    """One decode step of ``rows`` sequences behind ``context`` shared random tokens, ready to attend."""

    def __init__(self, shape: Shape, dtype: torch.dtype, context: int, rows: int = 1) -> None:
        self.shape = shape
        layout = KVLayout(
            num_layers=shape.layers,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.dim,
            block_size=BLOCK,
            dtype=dtype,
        )
        pages = context // BLOCK + rows
        pool = PagePool(pages, BLOCK)
        self.storage = PageStorage(layout, pages)
        generator = torch.Generator().manual_seed(5)
        for tensor in (*self.storage.keys, *self.storage.values):
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
        tokens = np.arange(context + 1, dtype=np.uint32)
        first = pool.open(tokens)
        plan = Batch(pool, [first]).plan(np.array([context], np.int32))
        plan.fill(*(np.zeros(size, np.int32) for size in ((1, pages), context, (1, 2))))
        plan.commit()
        self.sequences = [first, *(pool.open(tokens) for _ in range(rows - 1))]
        self.step = Step.plan(
            self.storage, Batch(pool, self.sequences), places=[(row, 0) for row in range(rows)]
        )
        self.attention = PagedAttention(self.storage)
        self.query = torch.randn((rows, shape.heads, 1, shape.dim), generator=generator).to(dtype)
        self.new = torch.randn((rows, shape.kv_heads, 1, shape.dim), generator=generator).to(dtype)

    def attend(self) -> torch.Tensor:
        """Attend in every layer; return the last one's answer."""
        with torch.inference_mode():
            for layer in range(self.shape.layers):
                found = self.attention.attend(self.step, layer, self.query, self.new, self.new)
        return found


class Grouped(torch.nn.Module):
    """What ``sdpa_attention_forward`` asks of a module."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups
        self.is_causal = True


def peers(ours: Paged, context: int) -> dict[str, Callable[[], torch.Tensor]]:
    """Return torch's ways over the same K and V, contiguous: as transformers calls it, and folded."""
    shape = ours.shape
    ours.attend()  # the step's own K and V are written

    def contiguous(pool: torch.Tensor) -> torch.Tensor:
        ids = ours.step.spans[0].table.ids
        return (
            pool[ids].transpose(0, 1).reshape(1, shape.kv_heads, -1, shape.dim)[:, :, : context + 1].clone()
        )

    key, value = contiguous(ours.storage.keys[0]), contiguous(ours.storage.values[0])
    groups = shape.heads // shape.kv_heads
    module, query = Grouped(groups), ours.query

    @torch.inference_mode()
    def called() -> torch.Tensor:
        answer: torch.Tensor = sdpa_attention_forward(
            module, query, key, value, None, scaling=shape.dim**-0.5
        )[0]
        return answer

    @torch.inference_mode()
    def folded() -> torch.Tensor:
        rows = query.reshape(1, shape.kv_heads, groups, shape.dim)
        answer = torch.nn.functional.scaled_dot_product_attention(rows, key, value)
        return answer.reshape(1, 1, shape.heads, shape.dim)

    return {"called": called, "folded": folded}


def one_layer(name: str, rounds: int) -> dict[str, float]:
    """Return the Llama-8B-shaped layer's figures in one dtype."""
    context = 8192
    ours = Paged(LLAMA_8B, DTYPES[name], context)
    calls = {"ours": ours.attend, **peers(ours, context)}
    answers = {way: call().float() for way, call in calls.items()}
    for way in ("called", "folded"):
        if not torch.allclose(answers["ours"], answers[way], atol=2e-2 if name == "bf16" else 1e-5):
            raise SystemExit(f"our answer is not {way}'s")
    interleaved(calls, 2)
    seconds = interleaved(calls, rounds)
    return {
        f"layer8b_{name}_speedup": seconds["called"] / seconds["ours"],
        f"layer8b_{name}_vs_folded": seconds["folded"] / seconds["ours"],
        **{f"layer8b_{name}_{way}_us": value * 1e6 for way, value in seconds.items()},
    }


def bandwidth(rounds: int) -> dict[str, float]:
    """Return what share of the machine's read bandwidth the layer reaches at 32k in float32."""
    context = 32768
    ours = Paged(LLAMA_8B, torch.float32, context)
    size = sum(tensor.nbytes for tensor in (*ours.storage.keys, *ours.storage.values))
    room = torch.ones(size // 4)
    # The best of torch's ways to read all of it once.
    seconds = interleaved(
        {"ours": ours.attend, "dot": lambda: torch.dot(room, room), "sum": room.sum, "max": room.amax}, rounds
    )
    best = min(seconds["dot"], seconds["sum"], seconds["max"])
    return {
        "layer8b_f32_bandwidth": best / seconds["ours"],
        "layer8b_f32_32k_gb_per_s": size / seconds["ours"] / 1e9,
        "machine_read_gb_per_s": size / best / 1e9,
    }


def shared(name: str, rounds: int) -> dict[str, float]:
    """Return the attention of 8 sequences over one prefix of 8k, in times that of one."""
    one, eight = (Paged(BENCH, DTYPES[name], 8192, rows) for rows in (1, 8))
    seconds = interleaved({"one": one.attend, "eight": eight.attend}, rounds)
    return {
        f"{name}_shared_8_vs_1": seconds["eight"] / seconds["one"],
        **{f"{name}_shared_{count}_ms": value * 1e3 for count, value in seconds.items()},
    }


def figures(names: list[str], *, quick: bool) -> dict[str, float]:
    """Return all of them for these dtypes; ``shared_8_vs_1`` is the worst dtype's."""
    found: dict[str, float] = {}
    for name in names:
        found |= one_layer(name, 7 if quick else 15)
        found |= shared(name, 9 if quick else 31)
    found |= bandwidth(5 if quick else 9)
    found["shared_8_vs_1"] = max(found[f"{name}_shared_8_vs_1"] for name in names)
    return found
