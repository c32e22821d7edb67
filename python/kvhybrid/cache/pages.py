"""The pages of the device tier as torch tensors: where K and V of every cached token lie.

Knows shapes and bytes. Refuses to know which tokens a page holds or who may read it: that is
``kvhybrid._core``.
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvhybrid.cache.memory import Buffers
from kvhybrid.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kvhybrid.cache.states import PageStates
    from kvhybrid.layout import KVLayout


class PageStorage:
    """K and V of ``num_pages`` pages, one tensor pair a layer.

    ``keys[layer]`` is ``[num_pages, num_kv_heads, block_size, head_dim]``, ``values[layer]`` the same
    with the value width, so that one page and head is one contiguous run and a run of pages is a view.
    A layer that keeps no K and V has empty tensors. ``devices``: where each layer's pages lie, when not
    all are on ``device``.
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
    ) -> None:
        self.layout = layout
        self.num_pages = num_pages
        self.buffers = Buffers()
        self.settled: Callable[[], None] = _ignore
        self.make_room: Callable[[], bool] = _nobody
        self._pin_memory = pin_memory
        self._non_blocking = non_blocking
        self.block_size = layout.block_size
        self.device = torch.device(device)
        self.dtype: torch.dtype = layout.torch_dtype
        self.states: PageStates | None = None
        """States behind these pages, for models with layers that keep one; set by ``KVCache``."""
        # Of one layer's keys; where layers differ, of one with the mean of their widths.
        self.page_bytes = layout.bytes_per_page // (2 * len(layout.kept_layers))
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        places = devices if devices is not None else [self.device] * layout.num_layers
        for shape, place in zip(layout.layers, places, strict=True):
            heads, width, value_width = (
                (shape.num_kv_heads, shape.head_dim, shape.value_head_dim) if shape is not None else (0, 0, 0)
            )
            self.keys.append(self._empty(num_pages, heads, self.block_size, width, device=place))
            self.values.append(self._empty(num_pages, heads, self.block_size, value_width, device=place))
        # What a single token looks like: most writes are one, and their check must cost next to nothing.
        self._single = [
            (
                torch.Size((1, keys.shape[1], 1, keys.shape[3])),
                torch.Size((1, keys.shape[1], 1, values.shape[3])),
            )
            for keys, values in zip(self.keys, self.values, strict=True)
        ]

    def _empty(self, *shape: int, device: torch.device) -> torch.Tensor:
        # Made under inference_mode it could not be written outside of it. Made by ``torch.empty`` it would
        # be filled, and paid for at once, where deterministic algorithms are asked for.
        with torch.inference_mode(False):
            room = torch.UntypedStorage(math.prod(shape) * self.dtype.itemsize, device=device)
            return torch.empty(0, dtype=self.dtype, device=device).set_(room).view(shape)

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
        return self.num_pages * self.layout.bytes_per_page

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

    def write_slot(self, layer: int, page: int, offset: int, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Write a single token that comes alone, ``[1, num_kv_heads, 1, width]``; False for other shapes."""
        if not 0 <= layer < len(self._single) or (key.shape, value.shape) != self._single[layer]:
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
        """Copy whole pages, ``(source, destination)``, in every layer."""
        for source, destination in pairs:
            for layer in self.layout.kept_layers:
                for pages in (self.keys[layer], self.values[layer]):
                    pages[destination].copy_(pages[source])

    def gather(
        self, layer: int, table: PageTable, start: int, stop: int, out: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        """Copy a row's tokens ``[start, stop)`` to ``out``: a pair of ``[num_kv_heads, tokens, width]``."""
        size, done = self.block_size, 0
        pieces = table.pieces(start, stop, size, self.page_bytes)
        for piece in pieces:
            tokens = piece.last - piece.first if piece.pages == 0 else piece.pages * size
            for pages, target in ((self.keys[layer], out[0]), (self.values[layer], out[1])):
                held, room = self.view(pages, piece), target[:, done : done + tokens]
                if piece.pages:
                    room, held = room.unflatten(1, (piece.pages, size)), held.transpose(0, 1)
                room.copy_(held)
            done += tokens

    def view(self, pages: torch.Tensor, piece: Piece, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return a piece of one layer's ``pages``: a view, or, of scattered pages, a copy (into ``out``).

        ``[num_kv_heads, tokens, width]`` of one page's part, ``[pages, num_kv_heads, block_size, width]``.
        """
        if piece.scattered is not None:
            return torch.index_select(pages, 0, self.to_device(piece.scattered, pages.device), out=out)
        if piece.pages == 0:
            return pages[piece.page, :, piece.first : piece.last]
        return pages[piece.page : piece.page + piece.pages]


def _ignore() -> None:
    """Nobody listens."""


def _nobody() -> bool:
    """Nobody holds what can be let go of."""
    return False


class Piece(NamedTuple):
    """Neighbouring tokens of one row: ``pages`` whole pages from ``page`` on, or, of none, a part of it."""

    page: int
    pages: int
    first: int = 0
    last: int = 0
    scattered: torch.Tensor | None = None
    """Ids of pages that are too many runs to read one by one."""


# Past this many runs of pages one index_select costs less than a few calls a run. A call takes as long as
# copying this many bytes: short contexts are gathered sooner, long ones are read in place.
MAX_RUNS = 8
RUN_BYTES = 2**18


class PageTable:
    """One row's page ids for one step, int64 on the CPU, and the pieces that they fall into."""

    __slots__ = ("_pieces", "ids")

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids
        self._pieces: dict[tuple[int, int, int | None], list[Piece]] = {}

    def pieces(self, start: int, stop: int, size: int, page_bytes: int | None) -> list[Piece]:
        """Return the tokens ``[start, stop)`` in pieces, in order; found once a step, not once a layer.

        ``size``: tokens a page; ``page_bytes``: bytes of one layer's keys in it, None to gather whatever
        the pages' order.
        """
        known = self._pieces.get((start, stop, page_bytes))
        if known is None:
            known = self._pieces[start, stop, page_bytes] = list(self._find(start, stop, size, page_bytes))
        return known

    def _find(self, start: int, stop: int, size: int, page_bytes: int | None) -> Iterator[Piece]:
        if start >= stop:
            return
        low, high = -(-start // size), stop // size
        if low > high:  # all within one page
            yield Piece(int(self.ids[high]), 0, start % size, stop % size)
            return
        if start % size:
            yield Piece(int(self.ids[low - 1]), 0, start % size, size)
        if low < high:
            ids = self.ids[low:high]
            breaks = ((ids[1:] - ids[:-1]) != 1).nonzero().flatten().tolist()
            if page_bytes is None or len(breaks) >= min(MAX_RUNS, 1 + len(ids) * page_bytes // RUN_BYTES):
                yield Piece(0, high - low, scattered=ids)
            else:
                for a, b in itertools.pairwise([0, *(at + 1 for at in breaks), high - low]):
                    yield Piece(int(ids[a]), b - a)
        if stop % size:
            yield Piece(int(self.ids[high]), 0, 0, stop % size)
