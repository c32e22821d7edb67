"""Pages that were demoted: their records beside the pages of full precision, and the way there and back.

Knows tensors, ids and the codec. Which page is demoted when, and who reads it, is decided elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Self, TypeAlias

import torch

from kvhybrid.cache.codec import Codec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvhybrid.layout import KVLayout

# Pages dequantized at once on their way to somewhere else: no more than caches hold.
CHUNK: Final = 32
Side: TypeAlias = Literal["k", "v"]
SIDES: Final[tuple[Side, Side]] = ("k", "v")


def record_bytes(layout: KVLayout, bits: int) -> int:
    """Return the bytes of one quantized page over all layers, scales and padding included."""
    return sum(layer_record_bytes(layout, bits, layer) for layer in layout.kept_layers)


def layer_record_bytes(layout: KVLayout, bits: int, layer: int) -> int:
    """Return the bytes of one quantized page in a layer that keeps K and V."""
    codec, shape, size = Codec(bits), layout.layers[layer], layout.block_size
    assert shape is not None
    record = codec.key_bytes(shape.head_dim, size) + codec.value_bytes(shape.value_head_dim, size)
    return shape.num_kv_heads * record


class Classes(NamedTuple):
    """The ids of some pages told apart: those of full precision, and records, by where they stand."""

    full_at: torch.Tensor
    full: torch.Tensor
    records: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """For each class of records where they stand, and which they are, counted from its first page on."""

    @classmethod
    def of(cls, ids: torch.Tensor, firsts: Sequence[int]) -> Self:
        """Tell the pages ``ids``, int64 on the CPU, apart. ``firsts``: where each class of records begins."""
        if len(firsts) == 1:
            classes = (ids >= firsts[0]).long()
        else:
            classes = torch.bucketize(ids, torch.tensor(firsts, device="cpu"), right=True)
        places = [(classes == index).nonzero().flatten() for index in range(len(firsts) + 1)]
        records = tuple((at, ids[at] - first) for at, first in zip(places[1:], firsts, strict=True))
        return cls(places[0], ids[places[0]], records)


class QuantizedPages:
    """Records of one class of quantized pages, uint8 ``[pages, num_kv_heads, bytes]``, a pair a layer.

    Their ids begin with ``first``.
    """

    def __init__(
        self,
        layout: KVLayout,
        first: int,
        num_pages: int,
        bits: int,
        places: Sequence[torch.device],
        empty: Callable[..., torch.Tensor],
    ) -> None:
        """``empty(*shape, dtype=, device=)`` makes a tensor that nothing has written yet."""
        self.layout, self.first, self.num_pages, self.bits = layout, first, num_pages, bits
        self.codec = Codec(bits)
        self.record_bytes = record_bytes(layout, bits)
        self.keys: list[torch.Tensor | None] = []
        self.values: list[torch.Tensor | None] = []
        for shape, place in zip(layout.layers, places, strict=True):
            for kept, size, width in (
                (self.keys, self.codec.key_bytes, shape.head_dim if shape is not None else 0),
                (self.values, self.codec.value_bytes, shape.value_head_dim if shape is not None else 0),
            ):
                if shape is None:
                    kept.append(None)
                    continue
                record = size(width, layout.block_size)
                kept.append(empty(num_pages, shape.num_kv_heads, record, dtype=torch.uint8, device=place))

    def __contains__(self, page: int) -> bool:
        return 0 <= page - self.first < self.num_pages

    def quantize(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        ids: torch.Tensor,
        records: torch.Tensor,
    ) -> torch.Tensor:
        """Write the pages ``ids`` of every layer to ``records``.

        Returns which the codec took, bool ``[count]``. A page that is refused in one layer is refused in all.
        """
        accepted = torch.ones(len(ids), dtype=torch.bool, device="cpu")
        for layer, (cold_keys, cold_values) in enumerate(zip(self.keys, self.values, strict=True)):
            if cold_keys is not None and cold_values is not None:
                accepted &= self.codec.quantize_keys(keys[layer], ids, cold_keys, records)
                accepted &= self.codec.quantize_values(values[layer], ids, cold_values, records)
        return accepted

    def dequantize(
        self, layer: int, side: Side, records: torch.Tensor, out: torch.Tensor, out_ids: torch.Tensor
    ) -> None:
        """Write one layer's keys or values of ``records`` to the pages ``out[out_ids]``."""
        found = self.keys[layer] if side == "k" else self.values[layer]
        assert found is not None, "a layer that keeps nothing is not read"
        write = self.codec.dequantize_keys if side == "k" else self.codec.dequantize_values
        write(found, records, out, out_ids)

    def lower(self, above: QuantizedPages, ids: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        """Write the records ``ids`` of another class to ``records``, by way of float32. As ``quantize``."""
        parts = zip(ids.split(CHUNK), records.split(CHUNK), strict=True)
        return torch.cat([self._lower(above, part, own) for part, own in parts])

    def _lower(self, above: QuantizedPages, ids: torch.Tensor, records: torch.Tensor) -> torch.Tensor:
        accepted = torch.ones(len(ids), dtype=torch.bool, device="cpu")
        for layer, (keys, values) in enumerate(zip(self.keys, self.values, strict=True)):
            shape = self.layout.layers[layer]
            if keys is None or values is None or shape is None:
                continue
            room = (len(ids), shape.num_kv_heads, self.layout.block_size)
            pages = torch.empty((*room, shape.head_dim), device=keys.device, dtype=torch.float32)
            above.dequantize(layer, "k", ids, pages, torch.arange(len(ids), device="cpu"))
            accepted &= self.codec.quantize_keys(pages, None, keys, records)
            pages = torch.empty((*room, shape.value_head_dim), device=values.device, dtype=torch.float32)
            above.dequantize(layer, "v", ids, pages, torch.arange(len(ids), device="cpu"))
            accepted &= self.codec.quantize_values(pages, None, values, records)
        return accepted


def as_ids(pages: Iterable[int]) -> torch.Tensor:
    """Return page ids as the codec takes them."""
    return torch.tensor(list(pages), dtype=torch.int64, device="cpu")
