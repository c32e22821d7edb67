"""Attention over one storage's pages on CUDA: what Triton's kernels take, and how a step reaches them.

Steps of few tokens a row. Everything else is ``kvhybrid.model.attention``'s. Triton itself is first imported
when such a step comes.
"""

from __future__ import annotations

import importlib.util
import threading
import weakref
from typing import TYPE_CHECKING

import torch

from kvhybrid.cache.codec import DTYPES
from kvhybrid.errors import LayoutError
from kvhybrid.model.triton.plan import DecodePlan

if TYPE_CHECKING:
    from kvhybrid.cache.pages import PageStorage
    from kvhybrid.cache.step import Step
    from kvhybrid.model.scored import Extras
    from kvhybrid.model.triton.decode import Records

MOST_TOKENS = 16
"""New tokens a row; with more, matrix products over a gathered past have enough to do."""
WIDEST = 256
"""Head widths beyond this do not fit a program's registers."""
OLDEST_DEVICE = (8, 0)
"""Compute capability: bfloat16 on tensor cores begins here."""


class _Plans(threading.local):
    def __init__(self) -> None:
        self.of: weakref.WeakKeyDictionary[Step, dict[object, DecodePlan]] = weakref.WeakKeyDictionary()


class TritonAttention:
    """Attends over the pages of one storage with the kernels of this folder."""

    def __init__(self, storage: PageStorage) -> None:
        self.storage = storage
        self._plans = _Plans()

    @staticmethod
    def serves(storage: PageStorage) -> bool:
        """Return True when every layer's pages lie on a GPU, in a shape and format that the kernels read."""
        pools = [pool for layer in storage.layout.kept_layers for pool in _pools(storage, layer)]
        return (
            storage.dtype in DTYPES
            and all(pool.shape[3] <= WIDEST for pool in pools)
            and all(_runs_triton(device) for device in {pool.device for pool in pools})
        )

    def takes(self, step: Step, query: torch.Tensor) -> bool:
        """Return True for a step of few tokens a row, asked in a format that the kernels read."""
        return step.longest <= MOST_TOKENS and query.dtype in DTYPES

    def writes(self, step: Step, layer: int, key: torch.Tensor, value: torch.Tensor) -> bool:
        """Return False: new K and V are written by a copy, before anybody attends."""
        return False

    def attend(
        self,
        step: Step,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        window: int | None = None,
        extras: Extras | None = None,
    ) -> torch.Tensor:
        """Attend causally for every row. Writes the step's ``key`` and ``value`` first unless that was done.

        ``query`` ``[batch, heads, tokens, head_dim]``; ``extras``: see ``decode``. Returns ``[batch,
        tokens, heads, value_head_dim]`` in the query's dtype, zeros where no row lies. Raises ``LayoutError``
        for page ids that this storage does not have.
        """
        if not step.has(layer):
            step.write(layer, key, value)
        if query.stride(3) != 1:
            query = query.contiguous()
        keys, values = _pools(self.storage, layer)
        out = step.room_for(query, values.shape[3])
        with torch.cuda.device_of(query):
            plan = self._plan(step, keys, window)
            from kvhybrid.model.triton.decode import LayerPages, decode

            pages = LayerPages(keys, values, self._records(layer))
            cap, sinks = extras if extras is not None else (None, None)
            if sinks is not None:
                sinks = sinks.to(query.device).contiguous()
            decode(plan, pages, query, out, scale, window=window, cap=cap, sinks=sinks)
        return out

    def _records(self, layer: int) -> tuple[Records, ...]:
        """Return a layer's quantized pages, where there are any."""
        from kvhybrid.model.triton.decode import Records

        found = []
        for records in self.storage.records:
            keys, values = records.keys[layer], records.values[layer]
            assert keys is not None, "attention is asked where a layer keeps K and V"
            assert values is not None, "and both of them"
            found.append(Records(records.bits, keys, values))
        return tuple(found)

    def _plan(self, step: Step, keys: torch.Tensor, window: int | None) -> DecodePlan:
        """Return the step's plan for pages there; the layers of a step share it."""
        known = self._plans.of.setdefault(step, {})
        key = keys.device, window
        if key not in known:
            top = max(int(span.table.ids.max()) for span in step.spans)
            if top >= self.storage.num_pages:
                raise LayoutError(f"a block table names page {top}, there are {self.storage.num_pages}")
            known[key] = DecodePlan.of(step.spans, self.storage.block_size, window, keys.device)
        return known[key]


def _pools(storage: PageStorage, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    return storage.keys[layer], storage.values[layer]


def _runs_triton(device: torch.device) -> bool:
    """Return True for an NVIDIA GPU of a generation that the kernels are compiled for, with Triton here."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(device) >= OLDEST_DEVICE
        and importlib.util.find_spec("triton") is not None
    )
