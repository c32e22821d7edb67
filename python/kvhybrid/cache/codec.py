"""Pages at 8 and 4 bits: how large a quantized page is, and how pages become such records and back.

Knows the format of a record (one page, one KV head, one layer; K and V apart) and nothing of who quantizes
which page when. A record's numbers are asymmetric codes with float16 scales and minimums: keys a channel over
the page's tokens, values a token over its channels, with outlier channels of the values scaled down by powers
of two. ``docs/decisions`` says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from kvhybrid._core import PageCodec
from kvhybrid.cache import codec_torch
from kvhybrid.cache.team import team_address
from kvhybrid.errors import LayoutError

if TYPE_CHECKING:
    from typing import Literal

    import numpy.typing as npt

    Part = Literal["keys", "values"]

LEAST_BLOCK: Final = 16
"""Fewer tokens would have more scales than codes."""
DTYPES: Final = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""What full pages may be, as the core numbers them."""
SHARED_NUMBERS: Final = 2**17
"""So many numbers take about 20 us to convert; fewer are not worth waking other threads."""
NATIVE: Final[dict[tuple[Part, int], PageCodec]] = {
    ("keys", 4): PageCodec("keys", 4),
    ("keys", 8): PageCodec("keys", 8),
    ("values", 4): PageCodec("values", 4),
    ("values", 8): PageCodec("values", 8),
}


@dataclass(frozen=True, slots=True)
class Codec:
    """Quantize whole pages to ``bits`` (8 or 4) and back.

    Full pages are one layer's K or V, ``[pages, num_kv_heads, block_size, width]`` in float32, bfloat16 or
    float16, width contiguous (a view of another tensor is fine); records are uint8 ``[pages, num_kv_heads,
    bytes]``, contiguous, on the same device. Ids are int64 ``[count]`` on the CPU and index the first
    dimension of the tensor beside them; ``None`` is ``0 .. count - 1``. ``threads``: how many work on a CPU,
    by default torch's for what is worth it; 1 in a thread that computes nothing else.

    Every call raises ``LayoutError`` for tensors that do not fit each other and ``IndexError`` for ids
    outside them, and nothing was written.
    """

    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise LayoutError(f"a codec has 4 or 8 bits, not {self.bits}")

    def key_bytes(self, head_dim: int, block_size: int) -> int:
        """Return the bytes of one page's keys of one head, scales and padding included."""
        return _record_bytes("keys", self.bits, head_dim, block_size)

    def value_bytes(self, value_head_dim: int, block_size: int) -> int:
        """Return the bytes of one page's values of one head, scales, exponents and padding included."""
        return _record_bytes("values", self.bits, value_head_dim, block_size)

    def quantize_keys(
        self,
        pages: torch.Tensor,
        ids: torch.Tensor | None,
        records: torch.Tensor,
        record_ids: torch.Tensor | None,
        *,
        threads: int | None = None,
    ) -> torch.Tensor:
        """Write the keys ``pages[ids]`` to ``records[record_ids]``; return bool ``[count]``, on the CPU.

        False: the page holds NaN, infinity or more than float16 can scale. It stays what it was, and its
        record means nothing. No record may be named twice.
        """
        return _quantize("keys", self.bits, pages, ids, records, record_ids, threads)

    def quantize_values(
        self,
        pages: torch.Tensor,
        ids: torch.Tensor | None,
        records: torch.Tensor,
        record_ids: torch.Tensor | None,
        *,
        threads: int | None = None,
    ) -> torch.Tensor:
        """Write the values ``pages[ids]`` to ``records[record_ids]``, as ``quantize_keys`` does keys."""
        return _quantize("values", self.bits, pages, ids, records, record_ids, threads)

    def dequantize_keys(
        self,
        records: torch.Tensor,
        record_ids: torch.Tensor | None,
        out: torch.Tensor,
        out_ids: torch.Tensor | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        """Write the keys of ``records[record_ids]`` to ``out[out_ids]``, in ``out``'s dtype.

        ``out`` is shaped like full pages. What float16 cannot hold becomes its largest number. No page of
        ``out`` may be named twice.
        """
        _dequantize("keys", self.bits, records, record_ids, out, out_ids, threads)

    def dequantize_values(
        self,
        records: torch.Tensor,
        record_ids: torch.Tensor | None,
        out: torch.Tensor,
        out_ids: torch.Tensor | None = None,
        *,
        threads: int | None = None,
    ) -> None:
        """Write the values of ``records[record_ids]`` to ``out[out_ids]``, as ``dequantize_keys`` does."""
        _dequantize("values", self.bits, records, record_ids, out, out_ids, threads)


def _quantize(
    part: Part,
    bits: int,
    pages: torch.Tensor,
    ids: torch.Tensor | None,
    records: torch.Tensor,
    record_ids: torch.Tensor | None,
    threads: int | None,
) -> torch.Tensor:
    _check_tensors(part, bits, pages, records)
    count = _count(pages, ids, record_ids)
    source, target = _numbers(pages, ids, count), _numbers(records, record_ids, count)
    if not count:
        return torch.ones(0, dtype=torch.bool, device="cpu")
    if pages.device.type != "cpu":
        _check_distinct(target)
        return codec_torch.quantize(part, bits, pages, _indices(source), records, _indices(target))
    with _fitting():
        refused = NATIVE[part, bits].quantize(
            _shape(pages),
            _place(pages),
            source,
            (records.data_ptr(), len(records)),
            target,
            threads=_threads(pages, count, threads),
            parallel=team_address(),
        )
    accepted = torch.ones(count, dtype=torch.bool, device="cpu")
    if refused:
        accepted[refused] = False
    return accepted


def _dequantize(
    part: Part,
    bits: int,
    records: torch.Tensor,
    record_ids: torch.Tensor | None,
    out: torch.Tensor,
    out_ids: torch.Tensor | None,
    threads: int | None,
) -> None:
    _check_tensors(part, bits, out, records)
    count = _count(records, record_ids, out_ids)
    source, target = _numbers(records, record_ids, count), _numbers(out, out_ids, count)
    if 0 in out.stride() and 0 in (
        step for step, size in zip(out.stride(), out.shape, strict=True) if size > 1
    ):
        raise LayoutError("numbers cannot be written where several of them share a place")
    if not count:
        return
    if out.device.type != "cpu":
        _check_distinct(target)
        codec_torch.dequantize(part, bits, records, _indices(source), out, _indices(target))
        return
    with _fitting():
        NATIVE[part, bits].dequantize(
            _shape(out),
            (records.data_ptr(), len(records)),
            source,
            _place(out),
            target,
            threads=_threads(out, count, threads),
            parallel=team_address(),
        )


class _fitting:  # noqa: N801  # reads as a statement
    """Say what the core refuses in our own words: once checked here, that is a page written twice."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError):
            raise LayoutError(str(error)) from error


def _threads(pages: torch.Tensor, count: int, asked: int | None) -> int:
    if asked is not None:
        return max(1, asked)
    return torch.get_num_threads() if count * pages[0].numel() >= SHARED_NUMBERS else 1


def _shape(pages: torch.Tensor) -> tuple[int, int, int]:
    _, heads, block, width = pages.shape
    return heads, block, width


def _place(pages: torch.Tensor) -> tuple[int, int, int, tuple[int, int, int]]:
    by_page, by_head, by_token, _ = (stride * pages.itemsize for stride in pages.stride())
    return pages.data_ptr(), len(pages), DTYPES[pages.dtype], (by_page, by_head, by_token)


def _record_bytes(part: Part, bits: int, width: int, block_size: int) -> int:
    _check_sizes(width, block_size)
    return NATIVE[part, bits].record_bytes(block_size, width)


def _check_sizes(width: int, block_size: int) -> None:
    if width < 1:
        raise LayoutError(f"a head has at least 1 channel, not {width}")
    if block_size < LEAST_BLOCK or block_size & (block_size - 1):
        raise LayoutError(
            f"quantized pages have a power of two of tokens, at least {LEAST_BLOCK}, not {block_size}"
        )


def _check_tensors(part: Part, bits: int, pages: torch.Tensor, records: torch.Tensor) -> None:
    if pages.dim() != 4 or records.dim() != 3:
        raise LayoutError(f"pages and records have 4 and 3 dimensions, not {pages.dim()} and {records.dim()}")
    if pages.dtype not in DTYPES or records.dtype != torch.uint8:
        raise LayoutError(f"cannot convert between pages in {pages.dtype} and records in {records.dtype}")
    if pages.device != records.device:
        raise LayoutError(f"pages lie on {pages.device} and records on {records.device}")
    _, heads, block, width = pages.shape
    wanted = _record_bytes(part, bits, width, block)
    if records.shape[1:] != (heads, wanted):
        raise LayoutError(
            f"pages of {heads} heads of {width} in blocks of {block} have records [{heads}, {wanted}], "
            f"not {list(records.shape[1:])}"
        )
    if pages.stride(3) != 1 and width > 1:
        raise LayoutError("the channels of a token must lie side by side")
    if not records.is_contiguous():
        raise LayoutError("records must be contiguous")


def _count(source: torch.Tensor, *lists: torch.Tensor | None) -> int:
    return next((len(ids) for ids in lists if ids is not None), len(source))


def _numbers(tensor: torch.Tensor, ids: torch.Tensor | None, count: int) -> npt.NDArray[np.int32]:
    """Return ids written out, as many as ``count``, each one of ``tensor``'s."""
    if ids is None:
        if count > len(tensor):
            raise IndexError(f"{count} pages are not within {len(tensor)}")
        return np.arange(count, dtype=np.int32)
    if ids.dtype != torch.int64 or ids.dim() != 1 or ids.device.type != "cpu":
        raise LayoutError(
            f"ids are int64 [count] on the CPU, not {ids.dtype} {list(ids.shape)} on {ids.device}"
        )
    if len(ids) != count:
        raise LayoutError(f"{count} pages cannot become {len(ids)}")
    wide = ids.numpy()
    if count and not 0 <= wide.min() <= wide.max() < len(tensor):
        raise IndexError(f"ids from {wide.min()} to {wide.max()} are not within {len(tensor)} pages")
    return wide.astype(np.int32)


def _indices(ids: npt.NDArray[np.int32]) -> torch.Tensor:
    return torch.from_numpy(ids.astype(np.int64))


def _check_distinct(ids: npt.NDArray[np.int32]) -> None:
    if len(np.unique(ids)) != len(ids):
        raise LayoutError("a page cannot be written twice in one call")
