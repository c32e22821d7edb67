"""``SessionRows``: the sequences behind one session, and the text that each of them stands for.

Rows of a left-padded batch are sequences of their own; padding is never stored. ``columns`` is the
length that ``transformers`` sees, padding included:

    row 0   . . . A B C D     pad 3, tokens ABCD
    row 1   E F G H I J K     pad 0
            <-cut-> <-new->   columns before ``cut`` are cached in every row, the rest is computed

Knows tokens, rows and steps; no model, and nothing of ``transformers``.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from kvhybrid._core import Batch
from kvhybrid.cache.pages import PageTable
from kvhybrid.cache.step import Step
from kvhybrid.errors import ClosedError, InvalidRequestError, UnsupportedError
from kvhybrid.model.padding import read_ids, read_padding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import numpy.typing as npt

    from kvhybrid._core import Sequence
    from kvhybrid.cache.kv_cache import KVCache
    from kvhybrid.model.padding import Ids
    from kvhybrid.model.routes import Reader

    Text: TypeAlias = npt.NDArray[np.uint32]


class SessionRows:
    """One conversation, or a batch of them: what is cached of it, and the step under way."""

    def __init__(self, cache: KVCache, reader: Reader, *, namespace: int, vocab_size: int, name: str) -> None:
        self.cache = cache
        self.reader = reader
        self.name = name
        self.columns = 0
        self.sequences: list[Sequence] = []
        self.step: Step | None = None
        self._namespace = namespace
        self._vocab_size = vocab_size
        self._pads: list[int] = []
        self.cached: list[int] = []
        self._texts: list[Text] = []  # what the rows hold while no pages are: see ``release``
        self._batch: Batch | None = None
        self._reopening: tuple[list[Text], int] = [], 0
        self._width = 0  # columns of the step under way
        self._appended = False  # whether that step brought its own tokens
        self._closed = False
        self._lock = threading.RLock()
        self._depth = 0  # how often its owner has entered ``in_use``
        self._is_closing = False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Own the session for a while; re-entrant for its thread.

        Raises ``InvalidRequestError`` while another thread owns it: one text has one next token.
        """
        if not self._lock.acquire(blocking=False):
            raise InvalidRequestError(f"session {self.name!r} is in use by another thread")
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._is_closing and self._depth == 0:
                self._close()
            self._lock.release()

    @property
    def num_rows(self) -> int:
        """Rows of the batch, 0 before the first prompt."""
        return len(self.sequences) or len(self._texts)

    def prepare(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Take a whole prompt, before it is sliced: line the rows up with what is cached of it.

        ``input_ids`` ``[batch, tokens]``; with a ``mask`` that is longer, they continue the session's text.
        Afterwards ``get_seq_length`` says how many columns need not be computed.
        """
        self._check_open()
        ids = read_ids(input_ids, self._vocab_size)
        batch, width = ids.shape
        if mask is not None and mask.dim() == 2 and mask.shape[1] > width:
            # The text so far is left as it is, and ``begin`` appends the new tokens to it.
            if self.num_rows != batch or mask.shape[1] != self.columns + width:
                raise InvalidRequestError(
                    f"attention_mask is {list(mask.shape)} for input_ids {list(ids.shape)}, but the session "
                    f"holds {self.num_rows} rows of {self.columns} columns: pass the whole prompt"
                )
            return
        pads = read_padding(mask, batch, width)
        self._line_up(pads, [ids[row, pad:].astype(np.uint32) for row, pad in enumerate(pads)])

    def refed(self, input_ids: torch.Tensor) -> int:
        """Return how many leading columns of a forward pass are cached and were fed all the same.

        Assisted decoding feeds the whole prompt again, and candidates behind it; it reads the last
        logits alone.
        """
        prepared = max((row.pending for row in self.sequences), default=0)
        if not 0 < prepared < input_ids.shape[1]:
            return 0
        ids = read_ids(input_ids, self._vocab_size)
        for row, (pad, held) in enumerate(zip(self._pads, self._held(), strict=True)):
            if not np.array_equal(ids[row, pad : self.columns], held):
                raise InvalidRequestError(
                    f"row {row}: the {ids.shape[1]} tokens fed are not the prompt prepared"
                )
        return self.columns

    def _held(self) -> list[Text]:
        """Return the computed tokens of every row."""
        if not self.sequences:
            return self._texts
        return [np.frombuffer(row.tokens(), np.uint32)[: row.length] for row in self.sequences]

    def _line_up(self, pads: list[int], texts: list[Text]) -> None:
        """Reopen every row on the longest cached prefix, and cut all rows at the same column.

        Opening the new rows before closing the old ones keeps shared pages from leaving in between.
        """
        old = self.sequences
        self.sequences = [self.cache.pool.open(text, self._namespace) for text in texts]
        _close_rows(old)
        cut = min(pad + row.length for pad, row in zip(pads, self.sequences, strict=True))
        for pad, row, text in zip(pads, self.sequences, texts, strict=True):
            keep = max(cut - pad, 0)
            if row.length > keep:
                row.truncate(keep)
                row.append(text[keep:])
        self._pads, self.columns, self._batch, self._texts = pads, cut, None, []
        self.cached = [row.length for row in self.sequences]
        self.reader.forget(0)

    def reopen(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Take the pages back after ``release``.

        Returns ``(input_ids, attention_mask)`` of columns that were evicted meanwhile and must be
        computed again first, or None.
        """
        if self.sequences or not self._texts:
            return None
        pads, texts, columns = self._pads, self._texts, self.columns
        # One more token than is held: ``open`` leaves the last one to compute.
        self._line_up(pads, [np.append(text, np.uint32(0)) for text in texts])
        for row, text in zip(self.sequences, texts, strict=True):
            row.truncate(len(text))
        if self.columns >= columns:
            return None
        self._reopening = texts, columns
        ids = np.zeros((len(texts), columns), np.int64)
        mask = np.zeros_like(ids)
        for index, (pad, text) in enumerate(zip(pads, texts, strict=True)):
            ids[index, pad:], mask[index, pad:] = text, 1
        return torch.from_numpy(ids[:, self.columns :]), torch.from_numpy(mask)

    @property
    def has_padding(self) -> bool:
        """True when any row begins with padding."""
        return any(self._pads)

    def stay_released(self) -> None:
        """Undo a ``reopen`` whose evicted columns could not be computed again."""
        _close_rows(self.sequences)
        self.sequences, self._batch = [], None
        self._texts, self.columns = self._reopening
        self.reader.forget(0)

    def positions(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Return the step's positions ``[batch, columns]``, and where there are tokens and no padding."""
        columns = np.arange(self.columns, self.columns + self._width)
        positions = columns - np.array(self._pads)[:, None]
        return positions.clip(min=0), positions >= 0

    def begin(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Plan the forward pass over ``input_ids`` ``[batch, tokens]``, which follow what is cached.

        Raises ``InvalidRequestError`` when they do not, ``CapacityError`` when the pages do not suffice;
        the session is then as it was.
        """
        self._check_open()
        if self.step is not None:
            raise InvalidRequestError("a forward pass of this session is still under way")
        ids = read_ids(input_ids, self._vocab_size)
        batch, width = ids.shape
        if mask is not None and mask.dim() != 2:
            raise UnsupportedError(
                f"attention_mask has {mask.dim()} dimensions; a session takes [batch, tokens] only"
            )
        is_new = not self.sequences
        if is_new:
            self._pads = read_padding(mask, batch, width)
            self.sequences = [
                self.cache.pool.open(ids[row, pad:].astype(np.uint32), self._namespace, reuse=False)
                for row, pad in enumerate(self._pads)
            ]
            self.columns = 0
        elif len(self.sequences) != batch:
            # Beams and several answers a prompt repeat each row in place.
            if batch % len(self.sequences):
                raise InvalidRequestError(
                    f"input_ids has {batch} rows, the session was begun with {self.num_rows}"
                )
            self.repeat(batch // len(self.sequences))
        if mask is not None and read_padding(mask, batch, self.columns + width) != self._pads:
            raise UnsupportedError("attention_mask hides other tokens than when the session was begun")
        counts = np.zeros(batch, np.int32)
        places: list[tuple[int, int]] = []
        appended = self._feed(ids, counts, places)
        try:
            if self._batch is None:
                self._batch = Batch(self.cache.pool, self.sequences)
            self.step = Step.plan(self.cache.storage, self._batch, counts, places=places)
        except BaseException:
            if is_new:
                _close_rows(self.sequences)
                self.sequences = []
            self._take_back(appended)
            raise
        self._appended, self._width = appended, width
        self.reader.start(self.columns)

    def _feed(self, ids: Ids, counts: npt.NDArray[np.int32], places: list[tuple[int, int]]) -> bool:
        """Match the fed columns to the rows' pending tokens, or append them. True if any was appended."""
        appended = False
        for index, (row, pad) in enumerate(zip(self.sequences, self._pads, strict=True)):
            column = max(pad - self.columns, 0)
            new = ids[index, column:].astype(np.uint32)
            counts[index] = len(new)
            places.append((index, min(column, ids.shape[1])))
            if row.pending == 0:
                row.append(new)
                appended = True
                continue
            awaited = np.frombuffer(row.tokens(), np.uint32)[row.length :]
            shared = min(len(awaited), len(new))
            if not np.array_equal(awaited[:shared], new[:shared]):
                self._take_back(appended)
                raise InvalidRequestError(
                    f"row {index}: the {len(new)} tokens fed are not the next of the {len(awaited)} prepared"
                )
            if shared < len(new):
                row.append(new[shared:])
                appended = True
        return appended

    def _take_back(self, appended: bool) -> None:
        if appended:
            for row in self.sequences:
                row.truncate(row.length)

    def finish(self, *, success: bool) -> None:
        """End the forward pass: its K and V count, or they never happened."""
        step, self.step = self.step, None
        if step is None:
            return
        try:
            if success:
                step.commit()
                self.columns += self._width
                return
            step.abandon()
        except UnsupportedError:  # from commit, which has abandoned the step
            self._forget_step()
            raise
        self._forget_step()

    def _forget_step(self) -> None:
        self._take_back(self._appended)
        self.reader.forget(self.columns)

    def release(self) -> None:
        """Unpin the pages and remember the tokens: a session that nobody runs holds no page."""
        self.finish(success=False)
        if self.sequences:
            self._texts = [text.copy() for text in self._held()]
        _close_rows(self.sequences)
        self.sequences, self._batch = [], None
        self.reader.forget(0)

    def close(self) -> None:
        """Release the pages for good; when another thread uses them, as soon as it is done. Idempotent."""
        self._is_closing = True
        if self._lock.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._lock.release()

    def _close(self) -> None:
        self.release()
        self._texts, self._closed = [], True

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"session {self.name!r} is closed")

    def crop(self, columns: int) -> None:
        """Drop every column from ``columns`` on."""
        self._reopen_or_raise()
        for row, pad in zip(self.sequences, self._pads, strict=True):
            row.truncate(max(columns - pad, 0))
        self.columns = columns
        self.reader.forget(columns)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order; a row taken twice is forked, not copied."""
        self._reopen_or_raise()
        old = self.sequences
        used: set[int] = set()
        chosen: list[Sequence] = []
        for row in rows:
            chosen.append(old[row].fork() if row in used else old[row])
            used.add(row)
        _close_rows(sequence for row, sequence in enumerate(old) if row not in used)
        self.sequences, self._pads, self._batch = chosen, [self._pads[row] for row in rows], None
        self.reader.reorder(rows)

    def repeat(self, repeats: int) -> None:
        """Fork every row ``repeats - 1`` times, forks beside their row."""
        self.select([row for row in range(self.num_rows) for _ in range(repeats)])

    def reset(self) -> None:
        """Forget the text."""
        self.release()
        self._texts, self._pads, self.columns = [], [], 0

    def materialise(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies ``[batch, num_kv_heads, columns, width]`` of a layer's K and V, zeros for padding."""
        self._reopen_or_raise()
        storage = self.cache.storage
        keys, values = (
            pages.new_zeros((self.num_rows, pages.shape[1], self.columns, pages.shape[3]))
            for pages in (storage.keys[layer], storage.values[layer])
        )
        for index, (row, pad) in enumerate(zip(self.sequences, self._pads, strict=True)):
            table = PageTable(torch.from_numpy(np.frombuffer(row.block_table(), np.int32).astype(np.int64)))
            out = keys[index, :, pad : pad + row.length], values[index, :, pad : pad + row.length]
            storage.gather(layer, table, 0, row.length, out)
        return keys, values

    def _reopen_or_raise(self) -> None:
        """Take released pages back; raises ``InvalidRequestError`` when some were evicted meanwhile."""
        if self.reopen() is not None:
            raise InvalidRequestError(
                f"pages of session {self.name!r} were evicted: run it through generate or forward first"
            )


def _close_rows(rows: Iterable[Sequence]) -> None:
    for row in rows:
        row.close()
