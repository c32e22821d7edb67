"""One planned step of a batch: which tokens are new, and on which pages they and their past lie.

The bridge between a native plan (ids) and the forward pass (tensors). Knows no model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from kvhybrid._core import StepRows
from kvhybrid.cache.demotion import demote, undone
from kvhybrid.cache.pages import PageTable
from kvhybrid.errors import CapacityError, LayoutError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvhybrid._core import Batch, Plan
    from kvhybrid.cache.pages import PageStorage

    Tokens: TypeAlias = npt.NDArray[np.uint32] | npt.NDArray[np.int64] | npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Span:
    """One row's part of a step: ``count`` new tokens behind ``past``, at ``(row, column)`` of the input."""

    row: int
    column: int
    count: int
    past: int
    table: PageTable

    @property
    def total(self) -> int:
        """Tokens of the row once this step is computed."""
        return self.past + self.count


class Step:
    """A filled plan. ``commit`` after the forward pass, or ``abandon``; dropping it abandons it."""

    def __init__(
        self,
        storage: PageStorage,
        plan: Plan,
        spans: tuple[Span, ...],
        slots: npt.NDArray[np.int32] | torch.Tensor,
    ) -> None:
        self.storage = storage
        self.spans = spans
        self._plan = plan
        self._slots = slots
        self._written: set[int] = set()
        self._alone: list[Step] = []
        self._indices: dict[torch.device, tuple[torch.Tensor, ...]] = {}
        self._seen: dict[tuple[int, torch.device], torch.Tensor] = {}
        self._was_abandoned = False

    @classmethod
    def plan(
        cls,
        storage: PageStorage,
        batch: Batch,
        counts: npt.NDArray[np.int32] | None = None,
        *,
        tokens: Tokens | None = None,
        places: Sequence[tuple[int, int]] | None = None,
    ) -> Step:
        """Plan the next step of every row of ``batch``, and copy what must be copied before writing.

        ``counts``: pending tokens to compute a row (``None``: all), ``tokens``: one token a row to append
        first. ``places``: where each row's new tokens lie in the model input, ``(row, first column)``;
        ``None`` lays them one behind the other in row 0.

        Raises ``CapacityError`` when the pool has no room; nothing has changed then.
        """
        with storage.still:
            while True:
                with undone(plan_with_room(storage, batch, counts, tokens)) as plan:
                    tables, slots, lengths = _filled(plan, len(batch))
                    if demote(storage, plan):
                        break
            if storage.states is not None:
                # What these pages held, and the text that led up to it, is gone from here on.
                storage.states.drop(np.unique(slots // storage.block_size).tolist())
            storage.copy_pages(plan.copies)
        spans, column = [], 0
        for row, (past, count) in enumerate(lengths.tolist()):
            if count == 0:
                continue
            place = (0, column) if places is None else places[row]
            pages = -(-(past + count) // storage.block_size)
            spans.append(Span(*place, count, past, PageTable(tables[row, :pages])))
            column += count
        return cls(storage, plan, tuple(spans), slots)

    def rows(self) -> list[Step]:
        """Return the step row by row, each as if alone in the input; only the whole can be committed."""
        alone, done = [], 0
        for span in self.spans:
            slots = self._slots[done : done + span.count]
            alone.append(Step(self.storage, self._plan, (replace(span, row=0, column=0),), slots))
            done += span.count
        self._alone = alone
        return alone

    @property
    def is_complete(self) -> bool:
        """True when every layer that keeps K and V was written: one left out leaves pages half filled."""
        if self._alone:
            return all(step.is_complete for step in self._alone)
        return len(self._written) == len(self.storage.layout.kept_layers)

    @cached_property
    def fills_blocks(self) -> bool:
        """True when the step completes a block of some row, so that its commit seals pages."""
        size = self.storage.block_size
        return any(span.total // size > span.past // size for span in self.spans)

    @property
    def num_tokens(self) -> int:
        """New tokens of all rows."""
        return len(self._slots)

    @cached_property
    def reach(self) -> tuple[int, int]:
        """Rows and columns that the input must have at least."""
        rows = max((span.row + 1 for span in self.spans), default=0)
        return rows, max((span.column + span.count for span in self.spans), default=0)

    @cached_property
    def _is_one_each(self) -> bool:
        """True for a step of one token a row: written with one indexed copy a layer."""
        return len(self.spans) > 1 and all(span.count == 1 for span in self.spans)

    def _one_each(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Index tensors of such a step, for pages on ``device``; made once a step."""
        if device not in self._indices:
            size = self.storage.block_size
            rows = torch.tensor([span.row for span in self.spans], device="cpu")
            columns = torch.tensor([span.column for span in self.spans], device="cpu")
            slots = torch.as_tensor(self._slots, device="cpu").long()
            indices = (rows, columns, slots // size, slots % size)
            self._indices[device] = tuple(self.storage.to_device(index, device) for index in indices)
        return self._indices[device]

    def seen(self, columns: int, device: torch.device) -> torch.Tensor | None:
        """Return which of the last ``columns`` columns are each row's text and no padding.

        Bool ``[rows, 1, 1, columns]``, or None when all are. Of steps of one token a row.
        """
        if self.shortest >= columns:
            return None
        if (columns, device) not in self._seen:
            first = torch.tensor([columns - span.total for span in self.spans], device="cpu")
            seen = torch.arange(columns, device="cpu") >= first[:, None]
            self._seen[columns, device] = seen[:, None, None].to(device)
        return self._seen[columns, device]

    @cached_property
    def shortest(self) -> int:
        """Tokens of the shortest row, new ones included: with more columns than that, some are padding."""
        return min(span.total for span in self.spans)

    @cached_property
    def longest(self) -> int:
        """Most new tokens of a row."""
        return max((span.count for span in self.spans), default=0)

    @cached_property
    def kernel_rows(self) -> StepRows:
        """The rows as the native kernel reads them."""
        tables = self.spans[0].table.numbers
        if len(self.spans) > 1:
            found = [span.table.numbers for span in self.spans]
            rows = np.zeros((len(found), max(map(len, found))), np.int32)
            for row, numbers in zip(rows, found, strict=True):
                row[: len(numbers)] = numbers
            tables = rows.reshape(-1)
        lengths = np.array([number for span in self.spans for number in (span.past, span.count)], np.int32)
        places = np.array([number for span in self.spans for number in (span.row, span.column)], np.int32)
        return StepRows(tables, lengths, places, self.storage.block_size)

    @cached_property
    def _slot(self) -> tuple[int, int] | None:
        """The page and offset of a step of a single token, else None."""
        return divmod(int(self._slots[0]), self.storage.block_size) if len(self._slots) == 1 else None

    def check(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raise ``LayoutError`` unless ``[batch, num_kv_heads, tokens, width]`` fits layout and step."""
        self.storage.check(layer, key, value)
        batch, tokens = self.reach
        if key.shape[0] != value.shape[0] or key.shape[0] < batch or key.shape[2] < tokens:
            raise LayoutError(
                f"layer {layer}: K is {list(key.shape)} and V {list(value.shape)}, the step needs "
                f"{batch} rows of {tokens} tokens"
            )

    def check_query(self, layer: int, query: torch.Tensor) -> None:
        """Raise ``LayoutError`` unless ``[batch, heads, tokens, head_dim]`` reaches every new token."""
        (batch, tokens), width = self.reach, self.storage.keys[layer].shape[3]
        if query.shape[0] < batch or query.shape[2] < tokens or query.shape[3] != width:
            raise LayoutError(
                f"layer {layer}: the query is {list(query.shape)}, the step needs {batch} rows of {tokens} "
                f"tokens, and keys are {width} wide"
            )

    def room_for(self, query: torch.Tensor, width: int) -> torch.Tensor:
        """Return room for the answer to ``query`` ``[batch, heads, tokens, head_dim]``: zeros where none is.

        ``[batch, tokens, heads, width]``, in the query's dtype and where it is, contiguous.
        """
        batch, heads, tokens, _ = query.shape
        room = torch.zeros if self.num_tokens < batch * tokens else torch.empty
        return room((batch, tokens, heads, width), dtype=query.dtype, device=query.device)

    def has(self, layer: int) -> bool:
        """Return True when the layer's new K and V were written."""
        return layer in self._written

    def mark_written(self, layer: int) -> None:
        """Note that somebody else wrote the layer's new K and V."""
        self._written.add(layer)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write the step's K and V ``[batch, num_kv_heads, tokens, width]`` into the pages.

        Columns that belong to no row (padding) are left out. Raises ``LayoutError`` before anything is
        written when the shapes are not the layout's, ``UnsupportedError`` for numbers that are finite and
        that the pages' dtype cannot hold.
        """
        if self.storage.limits and (limit := self.storage.limits.get(key.dtype)) is not None:
            check_range(layer, key, value, limit, self.storage.dtype)
        if self._slot is not None and self.storage.write_slot(layer, *self._slot, key, value):
            self._written.add(layer)
            return
        self.check(layer, key, value)
        if key.requires_grad or value.requires_grad:
            key, value = key.detach(), value.detach()
        self._written.add(layer)
        if self._is_one_each:
            rows, columns, pages, offsets = self._one_each(self.storage.keys[layer].device)
            self.storage.write_slots(layer, pages, offsets, key[rows, :, columns], value[rows, :, columns])
            return
        for span in self.spans:
            new = slice(span.column, span.column + span.count)
            self.storage.write_run(
                layer, span.table, span.past, key[span.row, :, new], value[span.row, :, new]
            )

    def commit(self) -> None:
        """Make the step true: its full blocks are sealed and found by whoever comes next.

        Raises ``UnsupportedError``, and abandons the step, when a layer was not written.
        """
        if not self.is_complete:
            self.abandon()
            raise UnsupportedError(
                f"the forward pass wrote K and V of {len(self._written)} layers, "
                f"the layout has {len(self.storage.layout.kept_layers)}"
            )
        self._plan.commit()
        self.storage.settled()

    def abandon(self) -> None:
        """Give the step's pages back. A no-op when ``commit`` has done so already."""
        if not self._was_abandoned:
            self._was_abandoned = True
            self._plan.abandon()


def plan_with_room(
    storage: PageStorage,
    batch: Batch,
    counts: npt.NDArray[np.int32] | None = None,
    tokens: Tokens | None = None,
) -> Plan:
    """Plan; while there is no room, have those let go who hold pages that nobody needs now."""
    while True:
        try:
            return batch.plan(counts, tokens=tokens)
        except CapacityError:
            if not storage.make_room():
                raise


def _filled(
    plan: Plan, rows: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Fill a plan; return its block tables, slots and lengths."""
    tables = np.empty((rows, max(plan.max_pages, 1)), np.int32)
    slots = np.empty(plan.num_tokens, np.int32)
    lengths = np.empty((rows, 2), np.int32)
    plan.fill(tables, slots, lengths)
    return tables, slots, lengths


def check_range(layer: int, key: torch.Tensor, value: torch.Tensor, limit: float, dtype: torch.dtype) -> None:
    """Raise ``UnsupportedError`` for a finite number beyond ``limit``, the largest of the pages' ``dtype``.

    Infinities and NaN are the model's own, and stay what they are.
    """
    for name, tensor in (("K", key.detach()), ("V", value.detach())):
        if bool(tensor.abs().amax() <= limit) or not tensor.numel():
            continue
        if bool((tensor.to(dtype).isinf() & tensor.isfinite()).any()):
            raise UnsupportedError(
                f"layer {layer}: {name} holds numbers beyond {limit:g}, which pages of {dtype} cannot hold: "
                "lay the cache out in bfloat16 or float32"
            )
