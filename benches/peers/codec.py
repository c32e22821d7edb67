"""Quantizing pages and back: gigabytes of full-precision numbers a second, against copying them.

K and V of 8 pages of 64 tokens and 8 KV heads of 128 are converted again and again, with all that they become
in the last-level cache; the copy is torch's ``copy_`` of the same tensors, in the same turns. A rate counts
full-precision bytes. hqq, where it is installed, quantizes the same numbers its own way.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

import torch
from bench_model import DTYPES, interleaved
from report import arguments, write_report

from kvhybrid.cache.codec import Codec

if TYPE_CHECKING:
    from collections.abc import Callable

HEADS, BLOCK, WIDTH, OTHER_WIDTH = 8, 64, 128, 64
# float32: 4 MiB of K and V, as much for their copies.
PAGES = 8
ROUNDS, QUICK_ROUNDS = 200, 30


class Full(NamedTuple):
    """Full-precision pages, what they are copied or dequantized to, and how many bytes they are."""

    keys: torch.Tensor
    values: torch.Tensor
    key_out: torch.Tensor
    value_out: torch.Tensor

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    def copy(self) -> None:
        self.key_out.copy_(self.keys)
        self.value_out.copy_(self.values)


def full_pages(dtype: torch.dtype) -> Full:
    generator = torch.Generator().manual_seed(5)
    shape = (PAGES, HEADS, BLOCK, WIDTH)
    keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return Full(keys, values, torch.empty_like(keys), torch.empty_like(values))


def both_ways(bits: int, full: Full) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return calls that quantize and dequantize K and V; everything must come back."""
    codec = Codec(bits)
    keys, values = (
        torch.empty(PAGES, HEADS, size(WIDTH, BLOCK), dtype=torch.uint8)
        for size in (codec.key_bytes, codec.value_bytes)
    )

    def quantize() -> object:
        return (
            codec.quantize_keys(full.keys, None, keys, None),
            codec.quantize_values(full.values, None, values, None),
        )

    def dequantize() -> object:
        codec.dequantize_keys(keys, None, full.key_out)
        return codec.dequantize_values(values, None, full.value_out)

    quantize()
    dequantize()
    for true, back in ((full.keys, full.key_out), (full.values, full.value_out)):
        if (worst := (back.float() - true.float()).abs().max()) > 10 / 2**bits:
            raise SystemExit(f"{bits} bits: off by {worst:.2g}")
    return quantize, dequantize


def hqq_ways(bits: int, full: Full) -> tuple[Callable[[], object], Callable[[], object]] | None:
    """Return the same calls of hqq's quantizer as transformers' quantized cache uses it."""
    try:
        from hqq.core.quantize import Quantizer
    except ImportError as error:
        print(f"hqq left out: {error}", file=sys.stderr)
        return None
    held = []

    def quantize() -> None:
        held[:] = [
            Quantizer.quantize(
                tensor, nbits=bits, axis=0, group_size=64, device="cpu", compute_dtype=tensor.dtype
            )
            for tensor in (full.keys, full.values)
        ]
        for _, meta in held:
            meta["compute_dtype"] = full.keys.dtype

    def dequantize() -> None:
        for codes, meta in held:
            Quantizer.dequantize(codes, meta)

    quantize()
    dequantize()
    return quantize, dequantize


def relative_bytes(bits: int, width: int) -> float:
    """Return what a page of K and V takes of its bytes in bfloat16, everything counted."""
    codec = Codec(bits)
    return (codec.key_bytes(width, BLOCK) + codec.value_bytes(width, BLOCK)) / (2 * 2 * BLOCK * width)


def measure(name: str, rounds: int) -> dict[str, float]:
    full = full_pages(DTYPES[name])
    calls: dict[str, Callable[[], object]] = {"copy": full.copy}
    slow: dict[str, Callable[[], object]] = {}
    for bits in (8, 4):
        calls[f"int{bits}_quantize"], calls[f"int{bits}_dequantize"] = both_ways(bits, full)
        if (found := hqq_ways(bits, full)) is not None:
            slow[f"hqq{bits}_quantize"], slow[f"hqq{bits}_dequantize"] = found
    with torch.inference_mode():
        interleaved(calls, 3)
        seconds = interleaved(calls, rounds)
        # Hundreds of times as slow: a few rounds say enough, and more would take minutes.
        seconds |= interleaved(slow, 2) if slow else {}
    rates = {way: full.num_bytes / taken / 1e9 for way, taken in seconds.items()}
    figures = {
        f"{name}_{way}_vs_copy": rate / rates["copy"] for way, rate in rates.items() if way.startswith("int")
    }
    return figures | {f"{name}_{way}_gb_per_s": rate for way, rate in rates.items()}


def main() -> None:
    options = arguments((__doc__ or "").splitlines()[0]).parse_args()
    figures: dict[str, float] = {}
    for name in ("f32", "bf16"):
        figures |= measure(name, QUICK_ROUNDS if options.quick else ROUNDS)
    # The lesser dtype of each, under the short name.
    for bits in (8, 4):
        for way in ("quantize", "dequantize"):
            key = f"int{bits}_{way}_vs_copy"
            figures[key] = min(figures[f"{name}_{key}"] for name in ("f32", "bf16"))
        figures[f"int{bits}_bytes"] = relative_bytes(bits, WIDTH)
        figures[f"int{bits}_bytes_{OTHER_WIDTH}"] = relative_bytes(bits, OTHER_WIDTH)
    write_report("codec", figures, options.json)


if __name__ == "__main__":
    main()
