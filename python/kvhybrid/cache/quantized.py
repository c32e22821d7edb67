"""Pages that were demoted: their records beside the pages of full precision, and the way there and back.

Knows tensors, ids and the codec. Which page is demoted when, and who reads it, is decided elsewhere.
"""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, Self, TypeAlias

import torch

from kvhybrid.cache.codec import Codec
from kvhybrid.errors import ClosedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from kvhybrid._core import Plan
    from kvhybrid.cache.pages import PageStorage
    from kvhybrid.layout import KVLayout

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
    cold_at: torch.Tensor
    cold: torch.Tensor
    """Records, counted from the first quantized page on."""

    @classmethod
    def of(cls, ids: torch.Tensor, num_full: int) -> Self:
        """Tell the pages ``ids``, int64 on the CPU, apart."""
        is_cold = ids >= num_full
        full_at, cold_at = (~is_cold).nonzero().flatten(), is_cold.nonzero().flatten()
        return cls(full_at, ids[full_at], cold_at, ids[cold_at] - num_full)


class QuantizedPages:
    """Records of one storage's quantized pages, uint8 ``[pages, num_kv_heads, bytes]``, a pair a layer."""

    def __init__(
        self,
        layout: KVLayout,
        num_pages: int,
        bits: int,
        places: Sequence[torch.device],
        empty: Callable[..., torch.Tensor],
    ) -> None:
        """``empty(*shape, dtype=, device=)`` makes a tensor that nothing has written yet."""
        self.codec = Codec(bits)
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
        accepted = torch.ones(len(ids), dtype=torch.bool)
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


def demote(storage: PageStorage, plan: Plan) -> bool:
    """Quantize what a filled plan demotes, under ``storage.still``, before the plan writes anything.

    False: the codec refused a page, which keeps full precision from now on, and the plan was abandoned; there
    may be room for it all the same.
    """
    pairs = plan.demotions
    if not pairs:
        return True
    refused = storage.quantize(pairs)
    if storage.states is not None:
        storage.states.move(pair for pair in pairs if pair[1] not in refused)
    if refused:
        plan.refuse(refused)
        return False
    plan.moved()
    return True


@contextmanager
def undone(plan: Plan) -> Iterator[Plan]:
    """Abandon a plan that is not finished when an exception comes: nobody else could plan until it is."""
    try:
        yield plan
    except BaseException:
        with suppress(ClosedError):
            plan.abandon()
        raise


def as_ids(pages: Iterable[int]) -> torch.Tensor:
    """Return page ids as the codec takes them."""
    return torch.tensor(list(pages), dtype=torch.int64)
