"""Which programs attend to what in one step: rows, their pages, and prefixes that several rows share.

Plain integers, made once a step and window and copied to the device at once. Knows no tensor of K or V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from kvhybrid.cache.step import Span

LEAST_SHARED = 64
"""Tokens that rows must share before their prefix is worth programs and a merge of its own."""


@dataclass(frozen=True, slots=True)
class Works:
    """Ranges of tokens to attend to, ``[works, 4]``: first span, spans, first token, end."""

    table: torch.Tensor
    most_spans: int
    most_tokens: int

    def __len__(self) -> int:
        return self.table.shape[0]


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """One step's spans, in an order where rows of one shared prefix are neighbours.

    ``rows`` int32 ``[spans, 5 + pages]``: row, column, count, past, whether it has a shared prefix, page ids;
    ``own`` and ``shared``: what each row reads alone and what rows read together. All on the device.
    ``count``: the most new tokens of a row.
    """

    rows: torch.Tensor
    own: Works
    shared: Works | None
    count: int

    @classmethod
    def of(
        cls, spans: Sequence[Span], block_size: int, window: int | None, device: torch.device
    ) -> DecodePlan:
        """Plan these spans of a token or more each. ``window``: what a token sees, itself included."""
        tables = [span.table.ids.numpy() for span in spans]
        order, groups = _prefixes(tables, [span.past // block_size for span in spans])
        spans, tables = [spans[i] for i in order], [tables[i] for i in order]
        width = max(len(table) for table in tables)
        rows = np.zeros((len(spans), 5 + width), np.int32)
        starts = [0 if window is None else max(span.past + 1 - window, 0) for span in spans]
        for index, (span, table) in enumerate(zip(spans, tables, strict=True)):
            rows[index, :4] = span.row, span.column, span.count, span.past
            rows[index, 5 : 5 + len(table)] = table
        own = [[i, 1, starts[i], span.total] for i, span in enumerate(spans)]
        shared = []
        for first, size, pages in groups:
            members = range(first, first + size)
            start, stop = min(starts[i] for i in members), pages * block_size
            if stop - start < LEAST_SHARED:
                continue
            shared.append([first, size, start, stop])
            rows[first : first + size, 4] = 1
            for i in members:
                own[i][2] = max(stop, starts[i])
        # One copy to the device for all of it: a copy costs more than what is in it.
        flat = np.concatenate([rows.ravel(), np.asarray([*own, *shared], np.int32).ravel()])
        there = torch.from_numpy(flat).to(device)
        ranges = there[rows.size :].view(-1, 4)
        return cls(
            rows=there[: rows.size].view(rows.shape),
            own=_works(ranges[: len(own)], own),
            shared=_works(ranges[len(own) :], shared) if shared else None,
            count=max(span.count for span in spans),
        )


def _works(table: torch.Tensor, rows: list[list[int]]) -> Works:
    return Works(table, max(row[1] for row in rows), max(row[3] - row[2] for row in rows))


def _prefixes(
    tables: list[npt.NDArray[np.int64]], whole: list[int]
) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Return an order of the rows, and groups ``(first, rows, pages)`` of neighbours that share pages.

    ``whole``: pages of each row that no token of the step lies in; only these are shared. Rows with the
    same first page form one group, and share as many pages as all of them have in common.
    """
    by_page: dict[int, list[int]] = {}
    for index, table in enumerate(tables):
        by_page.setdefault(int(table[0]) if whole[index] else -1 - index, []).append(index)
    order: list[int] = []
    groups: list[tuple[int, int, int]] = []
    for members in by_page.values():
        if len(members) > 1:
            reach = min(whole[i] for i in members)
            stacked = np.stack([tables[i][:reach] for i in members])
            differs = (stacked != stacked[0]).any(axis=0)
            pages = int(differs.argmax()) if differs.any() else reach
            groups.append((len(order), len(members), pages))
        order += members
    return order, groups
