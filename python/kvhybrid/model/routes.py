"""The two ways in which cached K and V reach a model's attention.

*Paged*: the model gets its own new K and V back, marked, and our attention function reads the pages.
*Materialised*: the model gets contiguous tensors and attends as it always does; any model can.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import torch

from kvhybrid.model.interface import PageHandle, is_reading_pages

if TYPE_CHECKING:
    from kvhybrid.cache.pages import PageStorage
    from kvhybrid.cache.step import Step
    from kvhybrid.model.attention import PagedAttention


# Up to this many columns a decoding session keeps a contiguous mirror on the paged route, too: reading so
# little costs less than the calls that find it in pages.
SHORT = 1024


class Route(StrEnum):
    """How a model reads cached K and V; the probe at attach time chooses."""

    PAGED = "paged"
    MATERIALISED = "materialised"


class Reader(Protocol):
    """How one session hands its K and V to the model. ``reads_pages``: masks are left to us."""

    reads_pages: bool

    def start(self, columns: int) -> None:
        """A forward pass behind ``columns`` held columns begins."""

    def read(
        self, step: Step, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write ``key`` and ``value``; return what the layer's attention gets in their place."""

    def reorder(self, rows: list[int]) -> None:
        """Keep what is held of these rows, in this order."""

    def forget(self, columns: int) -> None:
        """Drop what is held of columns from ``columns`` on."""


class PagedReader:
    """The paged route: pages are read where they lie, and of short texts ``mirrors`` spare the search."""

    reads_pages = True

    def __init__(self, attention: PagedAttention, *, mirrors: bool = True) -> None:
        self._attention = attention
        self._mirror = MaterialisedReader(attention.storage)
        self._short = SHORT if mirrors and attention.native is None else -1
        self._is_short = False

    def start(self, columns: int) -> None:
        """A forward pass behind ``columns`` held columns begins."""
        self._mirror.start(columns)
        self._is_short = columns < self._short
        if not self._is_short:
            self._mirror.forget(0)

    def read(
        self, step: Step, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ``key`` marked with where its past lies, and ``value``.

        In a forward pass the native kernel writes them when it attends. A mirror without padding is
        returned as it is: whatever attends to it sees what it should.
        """
        native = self._attention.native
        if native is not None and is_reading_pages() and native.writes(step, layer, key, value):
            return PageHandle.mark(key, self._attention, step, layer), value
        step.write(layer, key, value)
        mirror = None
        if self._is_short and key.shape[2] == 1 and len(step.spans) == key.shape[0]:
            mirror = self._mirror.mirror(step, layer, key, value)
            if step.shortest == mirror[0].shape[2]:
                return mirror
        return PageHandle.mark(key, self._attention, step, layer, mirror), value

    def reorder(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        self._mirror.reorder(rows)

    def forget(self, columns: int) -> None:
        """Drop what is held of columns from ``columns`` on."""
        self._mirror.forget(columns)


class MaterialisedReader:
    """The materialised route: a contiguous mirror of the pages a layer, extended and never rebuilt.

    A mirror is ``[batch, num_kv_heads, room, width]`` with ``room`` growing by doubling, so that a step
    costs what its new tokens cost.
    """

    reads_pages = False

    def __init__(self, storage: PageStorage) -> None:
        self._storage = storage
        self._mirrors: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._filled: dict[int, int] = {}
        self._columns = 0

    def start(self, columns: int) -> None:
        """Remember how many columns lie before the step's own."""
        self._columns = columns

    def read(
        self, step: Step, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the layer's whole K and V, ``[batch, num_kv_heads, columns, width]``, padding included."""
        step.write(layer, key, value)
        return self.mirror(step, layer, key, value)

    def mirror(
        self, step: Step, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do the same with K and V that were written before."""
        past, total = self._columns, self._columns + key.shape[2]
        keys, values = self._grown(layer, total, key, value)
        filled = self._filled.get(layer, 0)
        if filled < past:
            for span in step.spans:
                pad = past + span.column - span.past
                start = max(filled - pad, 0)
                held = slice(pad + start, pad + span.past)
                self._storage.gather(
                    layer, span.table, start, span.past, (keys[span.row, :, held], values[span.row, :, held])
                )
        width = total - past
        if key.requires_grad or value.requires_grad:
            key, value = key.detach(), value.detach()
        keys.narrow(2, past, width).copy_(key)
        values.narrow(2, past, width).copy_(value)
        self._filled[layer] = total
        return keys.narrow(2, 0, total), values.narrow(2, 0, total)

    def _grown(
        self, layer: int, total: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        known = self._mirrors.get(layer)
        if known is not None and known[0].shape[2] >= total:
            return known
        held = self._filled.get(layer, 0)
        # A power of two, so that strides (and with them sums, on some CPUs) depend on the length alone.
        room = max(self._storage.block_size, 1 << (total - 1).bit_length())
        grown = []
        for index, new in enumerate((key, value)):
            batch, heads, _, width = new.shape
            # Zeros, because padding is multiplied by a weight of zero, and NaN times zero is NaN. No
            # inference tensor, because the next pass may be under another mode.
            with torch.inference_mode(False):
                mirror = torch.zeros((batch, heads, room, width), dtype=new.dtype, device=new.device)
            if known is not None:
                mirror[:, :, :held] = known[index][:, :, :held]
            grown.append(self._storage.buffers.track(mirror))
        self._mirrors[layer] = (grown[0], grown[1])
        return grown[0], grown[1]

    def reorder(self, rows: list[int]) -> None:
        """Keep these rows of every mirror, in this order."""
        track = self._storage.buffers.track
        with torch.inference_mode(False):
            for layer, (keys, values) in self._mirrors.items():
                self._mirrors[layer] = track(keys[rows]), track(values[rows])

    def forget(self, columns: int) -> None:
        """Drop what is held from ``columns`` on; with 0 the mirrors themselves."""
        if columns == 0:
            self._mirrors.clear()
            self._filled.clear()
        for layer, filled in self._filled.items():
            self._filled[layer] = min(filled, columns)
