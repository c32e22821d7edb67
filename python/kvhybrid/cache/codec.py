"""Pages at 8 and 4 bits: how large a quantized page is, and how pages become such records and back.

Knows the format of a record (one page, one KV head, one layer; K and V apart) and nothing of who quantizes
which page when. A record's numbers are asymmetric codes with float16 scales and minimums: keys a channel over
the page's tokens, values a token over its channels, with outlier channels of the values scaled down by powers
of two. ``docs/decisions`` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from kvhybrid.cache import codec_torch
from kvhybrid.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Callable

ALIGNMENT: Final = 16
"""A record's bytes are a multiple of this."""
LEAST_BLOCK: Final = 16
"""Fewer tokens would have more scales than codes."""
DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Codec:
    """Quantize whole pages to ``bits`` (8 or 4) and back.

    Full pages are one layer's K or V, ``[pages, num_kv_heads, block_size, width]`` in float32, bfloat16 or
    float16, width contiguous (a view of another tensor is fine); records are uint8 ``[pages, num_kv_heads,
    bytes]``, contiguous, on the same device. Ids are int64 ``[count]`` on the CPU and index the first
    dimension of the tensor beside them; ``None`` is ``0 .. count - 1``. Every call raises ``LayoutError``
    for tensors that do not fit each other and ``IndexError`` for ids outside them, and nothing was written.
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise LayoutError(f"a codec has 4 or 8 bits, not {self.bits}")

    def key_bytes(self, head_dim: int, block_size: int) -> int:
        """Return the bytes of one page's keys of one head, scales and padding included."""
        _check_sizes(head_dim, block_size)
        return _padded(head_dim * block_size * self.bits // 8 + 4 * head_dim)

    def value_bytes(self, value_head_dim: int, block_size: int) -> int:
        """Return the bytes of one page's values of one head, scales, exponents and padding included."""
        _check_sizes(value_head_dim, block_size)
        codes = block_size * -(-value_head_dim * self.bits // 8)
        return _padded(codes + 4 * block_size + value_head_dim)

    def quantize_keys(
        self,
        pages: torch.Tensor,
        ids: torch.Tensor | None,
        records: torch.Tensor,
        record_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write the keys ``pages[ids]`` to ``records[record_ids]``; return bool ``[count]``, on the CPU.

        False: the page holds NaN, infinity or more than float16 can scale. It stays what it was, and its
        record means nothing. No record may be named twice.
        """
        return self._quantize(codec_torch.quantize_keys, self.key_bytes, pages, ids, records, record_ids)

    def quantize_values(
        self,
        pages: torch.Tensor,
        ids: torch.Tensor | None,
        records: torch.Tensor,
        record_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write the values ``pages[ids]`` to ``records[record_ids]``, as ``quantize_keys`` does keys."""
        return self._quantize(codec_torch.quantize_values, self.value_bytes, pages, ids, records, record_ids)

    def dequantize_keys(
        self,
        records: torch.Tensor,
        record_ids: torch.Tensor | None,
        out: torch.Tensor,
        out_ids: torch.Tensor | None = None,
    ) -> None:
        """Write the keys of ``records[record_ids]`` to ``out[out_ids]``, in ``out``'s dtype.

        ``out`` is shaped like full pages. What float16 cannot hold becomes its largest number. No page of
        ``out`` may be named twice.
        """
        self._dequantize(codec_torch.dequantize_keys, self.key_bytes, records, record_ids, out, out_ids)

    def dequantize_values(
        self,
        records: torch.Tensor,
        record_ids: torch.Tensor | None,
        out: torch.Tensor,
        out_ids: torch.Tensor | None = None,
    ) -> None:
        """Write the values of ``records[record_ids]`` to ``out[out_ids]``, as ``dequantize_keys`` does."""
        self._dequantize(codec_torch.dequantize_values, self.value_bytes, records, record_ids, out, out_ids)

    def _quantize(
        self,
        convert: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
        size: Callable[[int, int], int],
        pages: torch.Tensor,
        ids: torch.Tensor | None,
        records: torch.Tensor,
        record_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        _check_tensors(pages, records, size)
        ids, record_ids = _check_ids(pages, ids, records, record_ids)
        _check_distinct(record_ids)
        if not len(ids):
            return torch.ones(0, dtype=torch.bool)
        packed, accepted = convert(_taken(pages, ids), self.bits)
        records[..., packed.shape[-1] :].index_fill_(0, record_ids.to(records.device), 0)
        records[..., : packed.shape[-1]].index_copy_(0, record_ids.to(records.device), packed)
        return accepted.cpu()

    def _dequantize(
        self,
        convert: Callable[[torch.Tensor, int, int, int], torch.Tensor],
        size: Callable[[int, int], int],
        records: torch.Tensor,
        record_ids: torch.Tensor | None,
        out: torch.Tensor,
        out_ids: torch.Tensor | None,
    ) -> None:
        _check_tensors(out, records, size)
        record_ids, out_ids = _check_ids(records, record_ids, out, out_ids)
        _check_distinct(out_ids)
        if not len(out_ids):
            return
        block, width = out.shape[2:]
        full = convert(_taken(records, record_ids), self.bits, block, width)
        if out.dtype == torch.float16:
            limit = torch.finfo(torch.float16).max
            full = full.clamp(-limit, limit)
        out.index_copy_(0, out_ids.to(out.device), full.to(out.dtype))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _check_sizes(width: int, block_size: int) -> None:
    if width < 1:
        raise LayoutError(f"a head has at least 1 channel, not {width}")
    if block_size < LEAST_BLOCK or block_size & (block_size - 1):
        raise LayoutError(
            f"quantized pages have a power of two of tokens, at least {LEAST_BLOCK}, not {block_size}"
        )


def _check_tensors(pages: torch.Tensor, records: torch.Tensor, size: Callable[[int, int], int]) -> None:
    if pages.dim() != 4 or records.dim() != 3:
        raise LayoutError(f"pages and records have 4 and 3 dimensions, not {pages.dim()} and {records.dim()}")
    if pages.dtype not in DTYPES or records.dtype != torch.uint8:
        raise LayoutError(f"cannot convert between pages in {pages.dtype} and records in {records.dtype}")
    if pages.device != records.device:
        raise LayoutError(f"pages lie on {pages.device} and records on {records.device}")
    _, heads, block, width = pages.shape
    wanted = size(width, block)
    if records.shape[1:] != (heads, wanted):
        raise LayoutError(
            f"pages of {heads} heads of {width} in blocks of {block} have records [{heads}, {wanted}], "
            f"not {list(records.shape[1:])}"
        )
    if pages.stride(3) != 1 and width > 1:
        raise LayoutError("the channels of a token must lie side by side")
    if not records.is_contiguous():
        raise LayoutError("records must be contiguous")


def _check_ids(
    source: torch.Tensor,
    source_ids: torch.Tensor | None,
    target: torch.Tensor,
    target_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both lists of ids, written out, once they fit each other and their tensors."""
    count = next((len(ids) for ids in (source_ids, target_ids) if ids is not None), len(source))
    found = []
    for tensor, ids in ((source, source_ids), (target, target_ids)):
        written = torch.arange(count) if ids is None else ids
        if written.dtype != torch.int64 or written.dim() != 1 or written.device.type != "cpu":
            raise LayoutError(
                f"ids are int64 [count] on the CPU, not {written.dtype} {list(written.shape)} "
                f"on {written.device}"
            )
        if len(written) != count:
            raise LayoutError(f"{count} pages cannot become {len(written)}")
        if count and not 0 <= int(written.min()) <= int(written.max()) < len(tensor):
            raise IndexError(
                f"ids from {int(written.min())} to {int(written.max())} are not within {len(tensor)} pages"
            )
        found.append(written)
    return found[0], found[1]


def _check_distinct(ids: torch.Tensor) -> None:
    if len(ids) > 1 and len(ids.unique()) != len(ids):
        raise LayoutError("a page cannot be written twice in one call")


def _taken(tensor: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return tensor.index_select(0, ids.to(tensor.device))
