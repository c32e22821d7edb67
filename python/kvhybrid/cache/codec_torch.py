"""The records of quantized pages made and read with torch alone, on any device.

Knows what a record's bytes mean; the native core makes and reads the same ones on a CPU. Checks nothing: that
is ``codec``'s. Everything is computed in float32, scales included, and only stored in float16.
"""

from __future__ import annotations

from typing import Final

import torch

OUTLIER_RATIO: Final = 4.0
"""A channel of the values this far above the median channel is scaled down before tokens get their scales."""
MOST_EXPONENT: Final = 60
"""Far beyond any model, and small enough that nothing a record can say overflows float32."""


def quantize(
    part: str,
    bits: int,
    pages: torch.Tensor,
    ids: torch.Tensor,
    records: torch.Tensor,
    record_ids: torch.Tensor,
) -> torch.Tensor:
    """Write ``pages[ids]`` to ``records[record_ids]``; return which could be quantized, on the CPU."""
    convert = quantize_keys if part == "keys" else quantize_values
    packed, accepted = convert(pages.index_select(0, ids.to(pages.device)), bits)
    packed = torch.nn.functional.pad(packed, (0, records.shape[-1] - packed.shape[-1]))
    records.index_copy_(0, record_ids.to(records.device), packed)
    return accepted.cpu()


def dequantize(
    part: str,
    bits: int,
    records: torch.Tensor,
    record_ids: torch.Tensor,
    out: torch.Tensor,
    out_ids: torch.Tensor,
) -> None:
    """Write the numbers of ``records[record_ids]`` to ``out[out_ids]``."""
    convert = dequantize_keys if part == "keys" else dequantize_values
    full = convert(records.index_select(0, record_ids.to(records.device)), bits, *out.shape[2:])
    if out.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max
        full = full.clamp(-limit, limit)
    out.index_copy_(0, out_ids.to(out.device), full.to(out.dtype))


def quantize_keys(pages: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the records of ``pages``, unpadded, and which pages could be quantized.

    ``pages``: ``[count, heads, block, width]``. Records: uint8 ``[count, heads, bytes]``: codes a channel
    over the page's tokens (of 4 bits token j and token j + block / 2 in a byte), scales ``[width]``,
    minimums ``[width]``. The second: bool ``[count]``.
    """
    full = pages.float().transpose(2, 3)
    codes, scale, minimum = _encode(full, bits)
    return _joined(_packed(codes, bits), scale, minimum), _usable(scale, minimum)


def quantize_values(pages: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the records of ``pages``, unpadded, and which pages could be quantized.

    As ``quantize_keys``, with codes a token over its channels (of 4 bits channel j and channel j + H in a
    byte, H half the width, rounded up), scales ``[block]``, minimums ``[block]``, exponents int8
    ``[width]``.
    """
    full = pages.float()
    exponents = _exponents(full)
    full = torch.ldexp(full, -exponents.unsqueeze(2).float())
    codes, scale, minimum = _encode(full, bits)
    if bits == 4 and codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    records = _joined(_packed(codes, bits), scale, minimum)
    return torch.cat((records, exponents.to(torch.int8).view(torch.uint8)), -1), _usable(scale, minimum)


def dequantize_keys(records: torch.Tensor, bits: int, block: int, width: int) -> torch.Tensor:
    """Return float32 ``[count, heads, block, width]`` of keys' records ``[count, heads, bytes]``."""
    size = width * block * bits // 8
    codes = _unpacked(records[..., :size].unflatten(-1, (width, -1)), bits)
    scale, minimum = _halves(records, size, width)
    return (codes.float() * scale + minimum).transpose(2, 3)


def dequantize_values(records: torch.Tensor, bits: int, block: int, width: int) -> torch.Tensor:
    """Return float32 ``[count, heads, block, width]`` of values' records ``[count, heads, bytes]``."""
    size = block * -(-width * bits // 8)
    codes = _unpacked(records[..., :size].unflatten(-1, (block, -1)), bits)[..., :width]
    scale, minimum = _halves(records, size, block)
    exponents = records[..., size + 4 * block : size + 4 * block + width].view(torch.int8)
    return torch.ldexp(codes.float() * scale + minimum, exponents.unsqueeze(2).float())


def _encode(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, scales and minimums of groups that lie along the last dimension.

    The minimum is rounded down and the scale up, and codes are computed against what is stored: none clips.
    """
    levels = 2**bits - 1
    minimum = _rounded_down(groups.amin(-1))
    low = minimum.float()
    span = groups.amax(-1) - low
    # A span so small that a part of it is nothing to float32 has the smallest scale, too.
    scale = -_rounded_down(-torch.maximum(span / levels, span.clamp(max=2.0**-24)))
    step = scale.float()
    inverse = torch.where(step > 0, 1 / step, 0.0)
    codes = ((groups - low.unsqueeze(-1)) * inverse.unsqueeze(-1)).round()
    # What is refused for its NaN gets codes all the same, and casting NaN is nobody's promise.
    return codes.nan_to_num(0.0).clamp(0, levels).to(torch.uint8), scale, minimum


def _rounded_down(numbers: torch.Tensor) -> torch.Tensor:
    """Return the largest float16 that is not above each float32 number; NaN stays NaN."""
    nearest = numbers.half()
    bits = nearest.view(torch.int16)
    below = torch.where(nearest > 0, bits - 1, bits + 1)
    below = torch.where(nearest == 0, torch.full_like(bits, -0x7FFF), below)  # the first one below zero
    return torch.where(nearest.float() > numbers, below, bits).view(torch.float16)


def _exponents(full: torch.Tensor) -> torch.Tensor:
    """Return int32 ``[count, heads, width]``: how often outlier channels are halved."""
    largest = full.abs().amax(2)
    # Sorted, for torch's own median is refused on CUDA where deterministic algorithms are asked for.
    middle = (largest.shape[-1] - 1) // 2
    median = largest.sort(-1).values[..., middle : middle + 1]
    ratio = largest / median
    exponents = ratio.log2().round().clamp(0, MOST_EXPONENT)
    return torch.where((ratio > OUTLIER_RATIO) & (median > 0), exponents, 0.0).to(torch.int32)


def _usable(scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    return (scale.isfinite() & minimum.isfinite()).flatten(1).all(-1)


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return codes
    low, high = codes.chunk(2, -1)
    return low | (high << 4)


def _unpacked(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return codes if bits == 8 else torch.cat((codes & 15, codes >> 4), -1)


def _joined(codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    return torch.cat((codes.flatten(2), scale.view(torch.uint8), minimum.view(torch.uint8)), -1)


def _halves(records: torch.Tensor, start: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return float32 scales and minimums, ``[count, heads, groups, 1]``."""
    both = records[..., start : start + 4 * count].contiguous().view(torch.float16).float().unsqueeze(-1)
    return both[:, :, :count], both[:, :, count:]
