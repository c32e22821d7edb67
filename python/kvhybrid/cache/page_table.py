"""One row's page ids for one step, and the runs of pages that its tokens fall into.

Knows ids; no tensors of K and V.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch

from kvhybrid.cache.quantized import Classes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Sequence as Many

    import numpy.typing as npt

    from kvhybrid._core import Sequence


class Piece(NamedTuple):
    """Neighbouring tokens of one row: ``pages`` whole pages from ``page`` on, or, of none, a part of it."""

    page: int
    pages: int
    first: int = 0
    last: int = 0
    scattered: torch.Tensor | None = None
    """Ids of pages that are too many runs to read one by one."""
    mixed: Classes | None = None
    """Pages of which some are quantized."""


# Past this many runs of pages one index_select costs less than a few calls a run. A call takes as long as
# copying this many bytes: short contexts are gathered sooner, long ones are read in place.
MAX_RUNS = 8
RUN_BYTES = 2**18


class PageTable:
    """One row's page ids for one step, and the pieces that they fall into."""

    __slots__ = ("_ids", "_pieces")

    def __init__(self, ids: torch.Tensor | npt.NDArray[np.int32]) -> None:
        self._ids = ids
        self._pieces: dict[tuple[int | None, ...], list[Piece]] = {}

    @classmethod
    def of(cls, sequence: Sequence) -> Self:
        """Return the pages of a sequence as they are now; to be read under ``PageStorage.still``."""
        return cls(np.frombuffer(sequence.block_table(), np.int32))

    @property
    def ids(self) -> torch.Tensor:
        """The ids as torch counts, int64 on the CPU."""
        if not isinstance(self._ids, torch.Tensor):
            self._ids = torch.from_numpy(self._ids.astype(np.int64))
        return self._ids

    @property
    def numbers(self) -> npt.NDArray[np.int32]:
        """The ids as the native side counts; a step over a native kernel needs them in no other form."""
        ids = self._ids
        return ids.numpy().astype(np.int32) if isinstance(ids, torch.Tensor) else ids

    def pieces(
        self,
        start: int,
        stop: int,
        size: int,
        page_bytes: int | None,
        firsts: Many[int] = (),
        most: int | None = None,
    ) -> list[Piece]:
        """Return the tokens ``[start, stop)`` in pieces, in order; found once a step, not once a layer.

        ``size``: tokens a page; ``page_bytes``: bytes of one layer's keys in it, None to gather whatever
        the pages' order; ``firsts``: the first page of each class of quantized ones; ``most``: pages of a
        piece that has such pages.
        """
        key = start, stop, page_bytes, most
        known = self._pieces.get(key)
        if known is None:
            known = self._pieces[key] = list(self._find(start, stop, size, page_bytes, firsts, most))
        return known

    def _find(
        self, start: int, stop: int, size: int, page_bytes: int | None, firsts: Many[int], most: int | None
    ) -> Iterator[Piece]:
        if start >= stop:
            return
        low, high = -(-start // size), stop // size
        if low > high:  # all within one page
            yield Piece(int(self.ids[high]), 0, start % size, stop % size)
            return
        if start % size:
            yield Piece(int(self.ids[low - 1]), 0, start % size, size)
        if low < high:
            yield from self._whole(self.ids[low:high], page_bytes, firsts, most)
        if stop % size:
            yield Piece(int(self.ids[high]), 0, 0, stop % size)

    def _whole(
        self, ids: torch.Tensor, page_bytes: int | None, firsts: Many[int], most: int | None
    ) -> Iterator[Piece]:
        if firsts and int(ids.max()) >= firsts[0]:
            if most is not None and len(ids) > most:
                for part in ids.split(most):
                    yield from self._whole(part, page_bytes, firsts, most)
                return
            yield Piece(0, len(ids), mixed=Classes.of(ids, firsts))
            return
        breaks = ((ids[1:] - ids[:-1]) != 1).nonzero().flatten().tolist()
        if page_bytes is None or len(breaks) >= min(MAX_RUNS, 1 + len(ids) * page_bytes // RUN_BYTES):
            yield Piece(0, len(ids), scattered=ids)
            return
        for a, b in itertools.pairwise([0, *(at + 1 for at in breaks), len(ids)]):
            yield Piece(int(ids[a]), b - a)
