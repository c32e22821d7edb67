"""``Rows``: the sequences behind a left-padded batch, lined up by column.

Each row is a sequence of its own; padding is never stored. ``columns`` is the length that
``transformers`` sees, padding included:

    row 0   . . . A B C D     pad 3, tokens ABCD
    row 1   E F G H I J K     pad 0
            <-held-> <-new->   what lies before ``columns`` is held in every row, the rest is computed

Knows tokens, pages and columns; no model, no step under way, no lock.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Self, TypeAlias

import numpy as np

from kvhybrid._core import Batch
from kvhybrid.cache.page_table import PageTable
from kvhybrid.cache.step import Step
from kvhybrid.errors import InvalidRequestError
from kvhybrid.model.compressed import WHOLE

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

    from kvhybrid._core import Sequence
    from kvhybrid.cache.kv_cache import KVCache
    from kvhybrid.model.compressed import Front
    from kvhybrid.model.padding import Ids
    from kvhybrid.model.session_states import SessionStates

    Text: TypeAlias = npt.NDArray[np.uint32]


class Fed(NamedTuple):
    """How a forward pass's columns fall on the rows."""

    counts: npt.NDArray[np.int32]
    """Tokens of each row."""
    places: list[tuple[int, int]]
    """Where each row's tokens begin in the input: ``(row, column)``."""
    is_new: bool
    """Whether the tokens were appended, and were not pending before."""


class Rows:
    """The sequences of one batch. Dropping the object closes them.

    ``fronts``: what stands for each row's beginning where that was compressed. ``gap``: columns by which what
    is stored is narrower than what is held: 0, or as many as were removed of every row, padding counted.
    """

    def __init__(
        self,
        cache: KVCache,
        sequences: list[Sequence],
        pads: list[int],
        columns: int,
        fronts: list[Front] | None = None,
        gap: int = 0,
    ) -> None:
        self.cache = cache
        self.sequences = sequences
        self.pads = pads
        self.columns = columns
        self.fronts = fronts if fronts is not None else [WHOLE] * len(sequences)
        self.gap = gap
        self._batch: Batch | None = None

    @classmethod
    def open(
        cls,
        cache: KVCache,
        texts: list[Text],
        pads: list[int],
        namespace: int,
        *,
        reuse: bool = True,
        share: bool = True,
        grid: int = 1,
        states: SessionStates | None = None,
    ) -> Self:
        """Open every row on its longest cached prefix, and cut all rows at the same column.

        ``grid``: the column is a multiple of it. ``states``: it is one from which they can go on, and do.
        What lies behind the cut is pending.
        """
        sequences = [cache.pool.open(text, namespace, reuse=reuse, share=share) for text in texts]
        cut = min(pad + row.length for pad, row in zip(pads, sequences, strict=True)) if reuse else 0
        cut -= cut % grid
        if states is not None:
            cut = states.resume(list(zip(pads, sequences, strict=True)), cut, grid)
        found = sum(row.length for row in sequences)
        for pad, row, text in zip(pads, sequences, texts, strict=True):
            keep = max(cut - pad, 0)
            if row.length > keep:
                row.truncate(keep)
                row.append(text[keep:])
        cache.give_up(found - sum(row.length for row in sequences))
        return cls(cache, sequences, list(pads), cut)

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def pending(self) -> int:
        """The most tokens that any row still awaits."""
        return max((row.pending for row in self.sequences), default=0)

    @property
    def is_compressed(self) -> bool:
        """True when pages hold less than the text of some row."""
        return any(front is not WHOLE for front in self.fronts)

    def known(self) -> list[Text]:
        """Return every row's tokens, pending ones included."""
        texts = [np.frombuffer(row.tokens(), np.uint32) for row in self.sequences]
        if not self.is_compressed:
            return texts
        return [
            np.concatenate((front.text, text[front.stored :]))
            for front, text in zip(self.fronts, texts, strict=True)
        ]

    def held(self) -> list[Text]:
        """Return the tokens of every row that were computed."""
        return [
            text[: row.length + front.removed]
            for text, row, front in zip(self.known(), self.sequences, self.fronts, strict=True)
        ]

    def seen(self, width: int) -> npt.NDArray[np.bool_] | None:
        """Return the mask ``[rows, columns]`` with which ``width`` new columns see just what is stored.

        None when it is the text's own: what is stored lies at the end of the columns, so that what was
        removed of a row hides as padding does.
        """
        if not self.is_compressed or not any(self.pads):
            return None
        hidden = [pad + front.removed for pad, front in zip(self.pads, self.fronts, strict=True)]
        seen: npt.NDArray[np.bool_] = np.arange(self.columns + width) >= np.array(hidden)[:, None]
        return seen

    def positions(self, width: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return the next ``width`` columns' positions ``[rows, width]``, and where no padding is."""
        columns = np.arange(self.columns, self.columns + width)
        positions = columns - np.array(self.pads)[:, None]
        return positions.clip(min=0), positions >= 0

    def refed(self, ids: Ids, before: int | None) -> int:
        """Return how many leading columns of ``ids`` are held and were fed all the same.

        Assisted decoding feeds candidates behind what is to compute, and since transformers 5 the whole
        prompt in front of it; it reads the last logits alone. ``before``: the column at which the call
        says that its tokens begin, None when it does not say.
        """
        if not 0 < self.pending < ids.shape[1] or before == self.columns:
            return 0
        for row, (pad, held) in enumerate(zip(self.pads, self.held(), strict=True)):
            if not np.array_equal(ids[row, pad : self.columns], held):
                if before is None:
                    return 0  # what is to compute, and more: ``feed`` compares it
                raise InvalidRequestError(
                    f"row {row}: the {ids.shape[1]} tokens fed are not the prompt prepared"
                )
        return self.columns

    def repeats(self, input_ids: torch.Tensor) -> int:
        """Return how often each prepared row comes, side by side: beams and several answers a prompt."""
        count = len(self)
        if self.pending == 0 or len(input_ids) % count:
            return 1
        each = len(input_ids) // count
        is_same = each > 1 and bool((input_ids.view(count, each, -1) == input_ids[::each, None]).all())
        return each if is_same else 1

    def feed(self, ids: Ids) -> Fed:
        """Match ``ids`` ``[rows, width]``, the next columns, to the pending tokens, or append them.

        Raises ``InvalidRequestError`` when other tokens are pending; the rows are then as they were.
        """
        counts = np.zeros(len(self), np.int32)
        places: list[tuple[int, int]] = []
        is_new = False
        for index, (row, pad) in enumerate(zip(self.sequences, self.pads, strict=True)):
            column = max(pad - self.columns, 0)
            new = ids[index, column:].astype(np.uint32)
            counts[index] = len(new)
            places.append((index, min(column, ids.shape[1])))
            if row.pending == 0:
                row.append(new)
                is_new = True
                continue
            awaited = np.frombuffer(row.tokens(), np.uint32)[row.length :]
            shared = min(len(awaited), len(new))
            if not np.array_equal(awaited[:shared], new[:shared]):
                if is_new:
                    self.take_back()
                raise InvalidRequestError(
                    f"row {index}: the {len(new)} tokens fed are not the next of the {len(awaited)} prepared"
                )
            if shared < len(new):
                row.append(new[shared:])
                is_new = True
        return Fed(counts, places, is_new)

    def plan(self, fed: Fed) -> Step:
        """Plan the forward pass over what was fed; raises ``CapacityError``, and nothing has changed."""
        if self._batch is None:
            self._batch = Batch(self.cache.pool, self.sequences)
        return Step.plan(self.cache.storage, self._batch, fed.counts, places=fed.places)

    def require_verification(self) -> None:
        """Seal only what ``verify`` allows from here on."""
        for row in self.sequences:
            row.require_verification()

    def verify(self, step: Step | None) -> None:
        """Let what was computed be sealed, that of the ``step`` under way included."""
        for row in self.sequences:
            row.verify(row.length)
        for span in step.spans if step is not None else ():
            self.sequences[span.row].verify(span.total)

    def take_back(self) -> None:
        """Drop every pending token."""
        for row in self.sequences:
            row.truncate(row.length)

    def rewind(self, columns: int, known: list[Text]) -> None:
        """Go back to ``columns`` held and the tokens ``known`` then."""
        self.crop(columns)
        for row, text, front in zip(self.sequences, known, self.fronts, strict=True):
            row.append(text[row.length + front.removed :])

    def reconsider(self, columns: int) -> None:
        """Have what is held from ``columns`` on computed all the same."""
        columns = max(columns, 0)
        if columns < self.columns:
            found = sum(row.length for row in self.sequences)
            self.rewind(columns, self.known())
            self.cache.give_up(found - sum(row.length for row in self.sequences))

    def share_up_to(self, columns: int) -> None:
        """Let others find nothing from column ``columns`` on."""
        for row, pad in zip(self.sequences, self.pads, strict=True):
            row.share_up_to(max(columns - pad, 0))

    def can_crop(self, columns: int) -> bool:
        """Return whether ``columns`` ends behind every compressed front."""
        return all(
            columns - pad >= len(front.text)
            for pad, front in zip(self.pads, self.fronts, strict=True)
            if front is not WHOLE
        )

    def crop(self, columns: int) -> None:
        """Drop every column from ``columns`` on, and what is pending; only where ``can_crop`` says so."""
        assert self.can_crop(columns)
        for row, pad, front in zip(self.sequences, self.pads, self.fronts, strict=True):
            row.truncate(max(min(columns, self.columns) - pad, 0) - front.removed)
        self.columns = min(columns, self.columns)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; a row taken twice is forked, not copied."""
        old = self.sequences
        used: set[int] = set()
        chosen: list[Sequence] = []
        for row in rows:
            chosen.append(old[row].fork() if row in used else old[row])
            used.add(row)
        for row, sequence in enumerate(old):
            if row not in used:
                sequence.close()
        self.sequences, self.pads, self._batch = chosen, [self.pads[row] for row in rows], None
        self.fronts = [self.fronts[row] for row in rows]

    def fork(self) -> Rows:
        """Return rows of their own over the same pages."""
        forks = [row.fork() for row in self.sequences]
        return Rows(self.cache, forks, list(self.pads), self.columns, list(self.fronts), self.gap)

    def materialise(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies ``[rows, num_kv_heads, columns, width]`` of a layer's K and V, zeros for padding.

        Of compressed rows, ``gap`` columns fewer.
        """
        storage = self.cache.storage
        width = self.columns - self.gap
        keys, values = (
            pages.new_zeros((len(self), pages.shape[1], width, pages.shape[3]))
            for pages in (storage.keys[layer], storage.values[layer])
        )
        for index, row in enumerate(self.sequences):
            start = width - row.length
            out = keys[index, :, start:], values[index, :, start:]
            with storage.still:
                storage.gather(layer, PageTable.of(row), 0, row.length, out)
        return keys, values

    def close(self) -> None:
        """Give the pages back. Idempotent."""
        for row in self.sequences:
            row.close()
