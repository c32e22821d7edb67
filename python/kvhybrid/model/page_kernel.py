"""The native attention kernel over one storage's pages: what it takes, and how tensors reach it.

Decode steps and short suffixes on a CPU. Everything else is ``kvhybrid.model.attention``'s.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import torch

from kvhybrid._core import PageKernel
from kvhybrid.cache.codec import DTYPES
from kvhybrid.cache.team import team_address

if TYPE_CHECKING:
    from kvhybrid.cache.pages import PageStorage
    from kvhybrid.cache.step import Step
    from kvhybrid.model.scored import Extras

# Addresses and number of full pages, format, shape; of each kind of quantized pages the same, and bits.
Layer: TypeAlias = tuple[
    tuple[int, int, int], int, tuple[int, int, int, int], list[tuple[tuple[int, int, int], int]]
]
# Up to this many new tokens a row; with more, torch's matmuls over a gathered past are faster.
MOST_TOKENS = 16


class NativeAttention:
    """Attends over the pages of one storage on the CPU; holds addresses, and so the storage."""

    def __init__(self, storage: PageStorage) -> None:
        self.storage = storage

    @staticmethod
    def serves(storage: PageStorage) -> bool:
        """Return True when the pages of every layer lie on a CPU, in a format that the kernel reads."""
        pools = [storage.keys[layer] for layer in storage.layout.kept_layers]
        return storage.dtype in DTYPES and all(pool.device.type == "cpu" for pool in pools)

    @cached_property
    def _kernel(self) -> tuple[PageKernel, dict[int, int]]:
        """The kernel, and which of its layers each of ours is."""
        storage = self.storage
        layers: list[Layer] = []
        numbers: dict[int, int] = {}
        for layer in storage.layout.kept_layers:
            keys, values = storage.keys[layer], storage.values[layer]
            numbers[layer] = len(layers)
            shape = (keys.shape[1], keys.shape[2], keys.shape[3], values.shape[3])
            pool = (keys.data_ptr(), values.data_ptr(), keys.shape[0])
            layers.append((pool, DTYPES[storage.dtype], shape, self._cold(layer)))
        return PageKernel(layers), numbers

    def _cold(self, layer: int) -> list[tuple[tuple[int, int, int], int]]:
        """Where a layer's quantized pages lie, how many there are, and their bits."""
        found = []
        for records in self.storage.records:
            keys, values = records.keys[layer], records.values[layer]
            assert keys is not None, "attention is asked where a layer keeps K and V"
            assert values is not None, "and both of them"
            found.append(((keys.data_ptr(), values.data_ptr(), records.num_pages), records.bits))
        return found

    def takes(self, step: Step, query: torch.Tensor) -> bool:
        """Return True for a step of few tokens a row, asked in a format that the kernel reads."""
        return step.longest <= MOST_TOKENS and query.dtype in DTYPES and query.is_cpu

    def writes(self, step: Step, layer: int, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Return True when ``attend`` can write the layer's new K and V itself: one call less a layer.

        Raises ``LayoutError`` when they are not the layout's.
        """
        if step.longest > MOST_TOKENS or not key.is_cpu or step.has(layer):
            return False  # what a layer hands over a second time takes the place of the first at once
        if key.dtype != self.storage.dtype or value.dtype != self.storage.dtype:
            return False
        if step.reach != (1, 1) or not self.storage.is_single(layer, key, value):
            step.check(layer, key, value)
        return True

    def attend(
        self,
        step: Step,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None,
        extras: Extras | None = None,
    ) -> torch.Tensor:
        """Attend causally for every row. Writes the step's ``key`` and ``value`` first unless that was done.

        ``query`` ``[batch, heads, tokens, head_dim]``; returns ``[batch, tokens, heads, value_head_dim]``.
        """
        kernel, numbers = self._kernel
        _, heads, tokens, _ = query.shape
        if query.stride(3) != 1:
            query = query.contiguous()
        width = self.storage.values[layer].shape[3]
        answer = step.room_for(query, width)
        new = None
        if not step.has(layer):
            # Looked at again: between handing them over and attending a model may have changed them.
            if self.writes(step, layer, key, value):
                key, value = key.contiguous(), value.contiguous()
                new = (_strided(key), _strided(value))
            else:
                step.write(layer, key, value)
        kernel.attend(
            numbers[layer],
            step.kernel_rows,
            DTYPES[query.dtype],
            heads,
            _strided(query),
            (answer.data_ptr(), tokens * heads * width, width, heads * width),
            scale,
            window=window,
            soft_cap=extras.cap if extras is not None else None,
            # Looked up in every step: whoever trains them writes in place.
            sinks=extras.sinks.tolist() if extras is not None and extras.sinks is not None else None,
            new=new,
            threads=torch.get_num_threads(),
            parallel=team_address(),
        )
        step.mark_written(layer)
        return answer


def _strided(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """Return the address of ``[rows, heads, tokens, width]`` and the strides of all but the width."""
    row, head, token, _ = tensor.stride()
    return tensor.data_ptr(), row, head, token
