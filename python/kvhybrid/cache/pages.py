"""The pages of the device tier as torch tensors: where K and V of every cached token lie.

Knows shapes and bytes. Refuses to know which tokens a page holds or who may read it: that is
``kvhybrid._core``.
"""

from __future__ import annotations

import itertools
import math
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

from kvhybrid.cache.memory import Buffers
from kvhybrid.cache.page_table import PageTable, Piece
from kvhybrid.cache.quantized import CHUNK, SIDES, Classes, QuantizedPages, as_ids
from kvhybrid.errors import LayoutError
from kvhybrid.layout import DTYPE_BYTES, as_torch_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from contextlib import AbstractContextManager

    from kvhybrid.cache.quantized import Side
    from kvhybrid.cache.states import PageStates
    from kvhybrid.layout import KVLayout

__all__ = ["PageStorage", "PageTable", "Piece"]

_DTYPES = tuple(map(as_torch_dtype, DTYPE_BYTES))


class PageStorage:
    """K and V of ``num_pages`` pages, one tensor pair a layer.

    ``keys[layer]`` is ``[num_full, num_kv_heads, block_size, head_dim]``, ``values[layer]`` the same
    with the value width, so that one page and head is one contiguous run and a run of pages is a view.
    A layer that keeps no K and V has empty tensors. ``devices``: where each layer's pages lie, when not
    all are on ``device``.
    Of ``num_pages`` the last ``num_quantized`` are quantized, in one class or two: ``records`` has them, from
    page ``num_full`` on, in the order of their ids. Only pages of full precision are written token by token;
    every reader takes all.
    On a CPU the tensors are mapped but not touched: memory is paid for as pages are first written.
    ``buffers`` counts what readers hold beside the pages. ``settled`` is called by whoever committed pages
    or let some go: it is a collector's, where there is one. ``make_room`` is called by whoever finds no page:
    it says whether somebody has let go of some.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_pages: int,
        device: torch.device | str = "cpu",
        *,
        devices: Sequence[torch.device] | None = None,
        pin_memory: bool = False,
        non_blocking: bool = False,
        quantized: Sequence[tuple[int, int]] = (),
    ) -> None:
        """``num_pages``: pages of full precision; ``quantized`` come on top: how many, in how many bits."""
        self.layout = layout
        self.num_full, self.num_quantized = num_pages, sum(count for count, _ in quantized)
        self.num_pages = num_pages + self.num_quantized
        self.buffers = Buffers()
        self.settled: Callable[[], None] = _ignore
        self.make_room: Callable[[], bool] = _nobody
        self._pin_memory = pin_memory
        self._non_blocking = non_blocking
        self.block_size = layout.block_size
        self.device = torch.device(device)
        self.dtype: torch.dtype = layout.torch_dtype
        # The largest number that these pages hold, by dtypes that have larger ones.
        most = torch.finfo(self.dtype).max
        self.limits = {d: most for d in _DTYPES if torch.finfo(d).max > most}
        self.most_pinned = 0
        """Pages of full precision that users may pin, which then make no room; set by ``KVCache``."""
        self.states: PageStates | None = None
        """States behind these pages, for models with layers that keep one; set by ``KVCache``."""
        # Of one layer's keys; where layers differ, of one with the mean of their widths.
        self.page_bytes = layout.bytes_per_page // (2 * len(layout.kept_layers))
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        places = list(devices) if devices is not None else [self.device] * layout.num_layers
        for shape, place in zip(layout.layers, places, strict=True):
            heads, width, value_width = (
                (shape.num_kv_heads, shape.head_dim, shape.value_head_dim) if shape is not None else (0, 0, 0)
            )
            self.keys.append(self._empty(num_pages, heads, self.block_size, width, device=place))
            self.values.append(self._empty(num_pages, heads, self.block_size, value_width, device=place))
        self.records: list[QuantizedPages] = []
        for first, (count, bits) in zip(self._firsts(quantized), quantized, strict=True):
            self.records.append(QuantizedPages(layout, first, count, bits, places, self._empty))
        self.firsts = tuple(records.first for records in self.records)
        self.still: AbstractContextManager[object] = threading.RLock() if self.records else nullcontext()
        """Held while pages move: by whoever plans until what it demotes is written, and by whoever reads
        pages outside of a plan of its own, from asking for the block table on."""
        # What a single token looks like: most writes are one, and their check must cost next to nothing.
        self._single = [
            (
                torch.Size((1, keys.shape[1], 1, keys.shape[3])),
                torch.Size((1, keys.shape[1], 1, values.shape[3])),
            )
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def _firsts(self, quantized: Sequence[tuple[int, int]]) -> list[int]:
        return list(itertools.accumulate((count for count, _ in quantized), initial=self.num_full))[:-1]

    def _empty(self, *shape: int, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
        dtype = dtype if dtype is not None else self.dtype
        # Made under inference_mode it could not be written outside of it. Made by ``torch.empty`` it would
        # be filled, and paid for at once, where deterministic algorithms are asked for.
        with torch.inference_mode(False):
            room = torch.UntypedStorage(math.prod(shape) * dtype.itemsize, device=device)
            return torch.empty(0, dtype=dtype, device=device).set_(room).view(shape)

    def to_device(self, indices: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Copy host indices to a layer's pages, pinned and asynchronously when so configured."""
        if device.type == "cpu":
            return indices
        if self._pin_memory:
            indices = indices.pin_memory()
        return indices.to(device, non_blocking=self._non_blocking)

    @property
    def nbytes(self) -> int:
        """Bytes that the pages own once all of them were touched."""
        own = sum(records.num_pages * records.record_bytes for records in self.records)
        return self.num_full * self.layout.bytes_per_page + own

    def most_new(self, rows: int) -> int | None:
        """Return how many tokens of each of ``rows`` one step may compute; None where nothing bounds it.

        New tokens go to pages of full precision. Half of those are for a step, so that the newest page of
        each row, a copy of it, and other steps find room beside it; less where users may pin more.
        """
        if not self.num_quantized:
            return None
        rows = max(rows, 1)
        free = min(self.num_full // 2, self.num_full - self.most_pinned - 2 * rows)
        return max(free // rows, 1) * self.block_size

    def most_rows(self) -> int:
        """Return how many rows may run at once: each holds a page of full precision and writes another."""
        return max((self.num_full - self.most_pinned) // 3, 1) if self.num_quantized else self.num_full

    def check(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raise ``LayoutError`` unless ``[batch, num_kv_heads, tokens, head_dim]`` fits this storage."""
        layout = self.layout
        if not 0 <= layer < layout.num_layers:
            raise LayoutError(f"layer {layer} is outside the layout's {layout.num_layers} layers")
        if key.dim() != 4 or value.dim() != 4:
            raise LayoutError(f"K and V must have 4 dimensions, got {key.dim()} and {value.dim()}")
        shape = layout.layers[layer]
        if shape is None:
            raise LayoutError(f"layer {layer} keeps no K and V, the layout says")
        for name, tensor, width in (("K", key, shape.head_dim), ("V", value, shape.value_head_dim)):
            if tensor.shape[1] != shape.num_kv_heads or tensor.shape[3] != width:
                raise LayoutError(
                    f"layer {layer}: {name} has {tensor.shape[1]} heads of {tensor.shape[3]}, "
                    f"the layout says {shape.num_kv_heads} of {width}"
                )
        if key.shape[2] != value.shape[2]:
            raise LayoutError(f"layer {layer}: K has {key.shape[2]} tokens, V has {value.shape[2]}")

    def write_run(
        self, layer: int, table: PageTable, past: int, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Write one row's new tokens behind its ``past`` tokens.

        ``key``, ``value``: ``[num_kv_heads, tokens, width]``.
        """
        for pages, new in ((self.keys[layer], key), (self.values[layer], value)):
            self._write(pages, table.ids, past, new)

    def _write(self, pages: torch.Tensor, table: torch.Tensor, past: int, new: torch.Tensor) -> None:
        size = self.block_size
        count = new.shape[1]
        done = 0
        index, offset = divmod(past, size)
        if offset:
            done = min(size - offset, count)
            pages[int(table[index])][:, offset : offset + done] = new[:, :done]
            index += 1
        if whole := (count - done) // size:
            blocks = new[:, done : done + whole * size]
            blocks = blocks.unflatten(1, (whole, size)).transpose(0, 1)
            ids = self.to_device(table[index : index + whole], pages.device)
            pages.index_copy_(0, ids, blocks.to(self.dtype))
            done += whole * size
            index += whole
        if done < count:
            pages[int(table[index])][:, : count - done] = new[:, done:]

    def is_single(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Return True for a token that comes alone, ``[1, num_kv_heads, 1, width]`` in the layer's widths."""
        return 0 <= layer < len(self._single) and (key.shape, value.shape) == self._single[layer]

    def write_slot(self, layer: int, page: int, offset: int, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Write a single token that comes alone, ``[1, num_kv_heads, 1, width]``; False for other shapes."""
        if not self.is_single(layer, key, value):
            return False
        for pages, new in ((self.keys[layer], key), (self.values[layer], value)):
            strides = pages.stride()
            slot = pages.as_strided(new.shape, strides, page * strides[0] + offset * strides[2])
            slot.copy_(new.detach() if new.requires_grad else new)
        return True

    def write_slots(
        self, layer: int, pages: torch.Tensor, offsets: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> None:
        """Write a token a row: ``pages``, ``offsets`` int64 ``[rows]``; ``key`` ``[rows, heads, width]``."""
        self.keys[layer][pages, :, offsets] = key.to(self.dtype)
        self.values[layer][pages, :, offsets] = value.to(self.dtype)

    def copy_pages(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Copy whole pages, ``(source, destination)``, in every layer; quantized ones as they are read."""
        for source, destination in pairs:
            for layer in self.layout.kept_layers:
                for side in SIDES:
                    pages = self.keys[layer] if side == "k" else self.values[layer]
                    if source < self.num_full:
                        pages[destination].copy_(pages[source])
                        continue
                    records = self._class_of(source)
                    record = as_ids([source - records.first])
                    records.dequantize(layer, side, record, pages, as_ids([destination]))

    def _class_of(self, page: int) -> QuantizedPages:
        return next(records for records in self.records if page in records)

    def quantize(self, pairs: Sequence[tuple[int, int]]) -> list[bool]:
        """Quantize whole pages, ``(source, destination)``, in every layer; return which the codec took.

        Each destination is of the class below its source's, and no page is named twice. What was refused
        holds nothing afterwards. See ``kvhybrid.cache.demotion``.
        """
        sources, targets = as_ids(pair[0] for pair in pairs), as_ids(pair[1] for pair in pairs)
        taken = torch.ones(len(pairs), dtype=torch.bool, device="cpu")
        above = None
        for below in self.records:
            at = ((targets >= below.first) & (targets < below.first + below.num_pages)).nonzero().flatten()
            ids, records = sources[at], targets[at] - below.first
            if len(at):
                with torch.no_grad():
                    if above is None:
                        taken[at] = below.quantize(self.keys, self.values, ids, records)
                    else:
                        taken[at] = below.lower(above, ids - above.first, records)
            above = below
        accepted: list[bool] = taken.tolist()
        return accepted

    def pieces(
        self, table: PageTable, start: int, stop: int, *, always_gather: bool = False, most: int | None = None
    ) -> list[Piece]:
        """Return the tokens ``[start, stop)`` of a row in pieces, in order.

        ``most``: pages of a piece that must be dequantized; ``always_gather``: see ``PageTable.pieces``.
        """
        page_bytes = None if always_gather else self.page_bytes
        return table.pieces(start, stop, self.block_size, page_bytes, self.firsts, most)

    def gather(
        self, layer: int, table: PageTable, start: int, stop: int, out: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Copy a row's tokens ``[start, stop)`` to ``out``: a pair of ``[num_kv_heads, tokens, width]``."""
        size, done = self.block_size, 0
        for piece in self.pieces(table, start, stop, most=CHUNK):
            tokens = piece.last - piece.first if piece.pages == 0 else piece.pages * size
            for side, target in zip(SIDES, out, strict=True):
                held, room = self.view(layer, side, piece), target[:, done : done + tokens]
                if piece.pages:
                    room, held = room.unflatten(1, (piece.pages, size)), held.transpose(0, 1)
                room.copy_(held)
            done += tokens

    def view(self, layer: int, side: Side, piece: Piece, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return a piece of one layer's keys or values: a view, or, of scattered or quantized pages, a copy.

        ``[num_kv_heads, tokens, width]`` of one page's part, ``[pages, num_kv_heads, block_size, width]``.
        ``out``: where to copy ``piece.pages`` pages to.
        """
        pages = self.keys[layer] if side == "k" else self.values[layer]
        if piece.mixed is not None:
            return self._mixed(layer, side, piece.mixed, out)
        if piece.scattered is not None:
            return torch.index_select(pages, 0, self.to_device(piece.scattered, pages.device), out=out)
        if piece.pages:
            return pages[piece.page : piece.page + piece.pages]
        if piece.page >= self.num_full:
            pages = self._mixed(layer, side, Classes.of(as_ids([piece.page]), self.firsts))
            return pages[0, :, piece.first : piece.last]
        return pages[piece.page, :, piece.first : piece.last]

    def _mixed(self, layer: int, side: Side, found: Classes, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return pages of any class, side by side, in full precision."""
        pages = self.keys[layer] if side == "k" else self.values[layer]
        if out is None:
            count = len(found.full) + sum(len(ids) for _, ids in found.records)
            out = pages.new_empty((count, *pages.shape[1:]))
        if len(found.full):
            full, at = (self.to_device(ids, pages.device) for ids in (found.full, found.full_at))
            out.index_copy_(0, at, pages.index_select(0, full))
        with torch.no_grad():
            for records, (at, ids) in zip(self.records, found.records, strict=True):
                if len(ids):
                    records.dequantize(layer, side, ids, out, at)
        return out


def _ignore() -> None:
    """Nobody listens."""


def _nobody() -> bool:
    """Nobody holds what can be let go of."""
    return False
