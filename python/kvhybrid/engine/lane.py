"""``Lane``: the running batch of one device, a step at a time, in a worker thread.

Everything that takes time happens here: opening, planning, the forward pass, choosing tokens, turning
them into text. What came of it returns as plain data. Knows no event loop and waits for nobody; one
thread at a time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch

from kvhybrid._core import Batch
from kvhybrid.cache.step import Step
from kvhybrid.errors import CapacityError
from kvhybrid.model.sampling import sample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt

    from kvhybrid.cache.kv_cache import KVCache
    from kvhybrid.engine.running import Running
    from kvhybrid.engine.text import Piece
    from kvhybrid.model.runner import Runner
    from kvhybrid.model.weights import StateName

__all__ = ["Lane", "Outcome"]


@dataclass(slots=True)
class Outcome:
    """What one step did. A row that appears in ``left``, ``failed`` or ``waiting`` holds no page any more."""

    pieces: list[tuple[Running, Piece, str | None]] = field(default_factory=list)
    """A new token's text, and the reason to end with it."""
    left: list[Running] = field(default_factory=list)
    """Rows that were cancelled."""
    failed: list[tuple[Running, Exception]] = field(default_factory=list)
    waiting: list[Running] = field(default_factory=list)
    """Candidates without room, and rows that had to make room: they go back to the queue."""
    num_tokens: int = 0
    preemptions: int = 0
    error: Exception | None = None
    """Why the forward pass failed, if it did."""
    fault: BaseException | None = None
    """What ended the lane, if anything has: it can make no other step."""


class Lane:
    """Steps a batch of rows over ``cache``. ``budget``: most tokens of one step, running rows first."""

    def __init__(
        self, runner: Runner, cache: KVCache, budget: int, look: Callable[[], StateName | None]
    ) -> None:
        """``look`` returns what the model is called now."""
        self.rows: list[Running] = []
        self._runner = runner
        self._look = look
        self._name: StateName | None = None  # what the model was called after the last forward pass
        self._has_looked = False
        self._pool = cache.pool
        self._storage = cache.storage
        self._hints = cache.hints
        self._budget = budget
        self._is_exact = cache.config.reproducible  # forward passes are cut where the rows say
        self._batch = Batch(cache.pool)
        self._full = False  # room was lacking, and no row has left since
        self._out = Outcome()  # of the step under way: whom it has let go must hear of its end

    def has_room(self) -> bool:
        """Return whether it is worth offering candidates: they are refused until a row has left."""
        return not self.rows or not (self._full or self._storage.most_rows() <= len(self.rows))

    def step(self, candidates: Sequence[Running]) -> Outcome:
        """Let cancelled rows go and ``candidates`` in, in their order, and compute one step of all rows."""
        out = self._out = Outcome()
        self._has_looked = False
        self._drop_cancelled(out)
        self._admit(candidates, out)
        if self.rows:
            self._advance(out)
            self._drop_cancelled(out)
        return out

    def fail(self, candidates: Sequence[Running], error: Exception) -> Outcome:
        """Give up every row and candidate, after an exception that ``step`` did not expect."""
        known = (*self.rows, *candidates, *self._out.left, *self._out.waiting)
        rows = list({row.key: row for row in known}.values())
        self.close(rows)
        return Outcome(failed=[(row, error) for row in rows], error=error)

    def close(self, rows: Sequence[Running] = ()) -> None:
        """Give every page back."""
        for row in (*self.rows, *rows):
            row.close()
            self._runner.forget(row.key)
        self.rows, self._batch, self._full = [], Batch(self._pool), False

    def _drop_cancelled(self, out: Outcome) -> None:
        for row in [row for row in self.rows if row.cancelled]:
            self._remove(row)
            out.left.append(row)

    def _remove(self, row: Running, *, is_done: bool = False) -> None:
        assert row.sequence is not None
        if row.needs_check:
            row.verify(self._present_name())
        self._batch.remove(row.sequence)
        self.rows.remove(row)
        if is_done:
            row.finish()
        else:
            row.close()
        self._storage.settled()
        self._runner.forget(row.key)
        self._full = False

    def _present_name(self) -> StateName | None:
        """Look at the model, once between two forward passes."""
        if not self._has_looked:
            self._name, self._has_looked = self._look(), True
        return self._name

    def _admit(self, candidates: Sequence[Running], out: Outcome) -> None:
        for row in candidates:
            if row.cancelled:
                out.left.append(row)
            elif self.has_room() and self._open(row):
                assert row.sequence is not None
                self._batch.add(row.sequence)
                self.rows.append(row)
                self._hints.drop(row.key)
            else:
                # Whoever comes behind waits too: a large request must not starve.
                self._full = True
                out.waiting.append(row)

    def _open(self, row: Running) -> bool:
        """Open the row if the pages suffice for its known tokens and one more, and for those of all rows."""
        size = self._pool.block_size
        row.look()
        if not self.rows:
            row.open(self._pool)
            return True
        owed = sum(-(-(r.num_stored + 1) // size) - r.sequence.num_pages for r in self.rows if r.sequence)
        # What a conversation holds is seen once it is taken.
        if row.prompt.held is None and not self._has(
            owed + -(-(row.num_stored + 1) // size) - row.match(self._pool) // size
        ):
            return False
        # Opening pins what matched, which may be what was counted as available.
        held = row.open(self._pool).num_pages
        if self._has(owed + -(-(row.num_stored + 1) // size) - held):
            return True
        row.close()
        return False

    def _has(self, pages: int) -> bool:
        """Return whether so many pages can be had, if need be from conversations at rest."""
        while pages > self._num_available():
            if not self._storage.make_room():
                return False
        return True

    def _num_available(self) -> int:
        return self._pool.num_free + self._pool.num_evictable

    def _advance(self, out: Outcome) -> None:
        active, step = self.rows, None
        try:
            planned = self._plan(out)
            if planned is None:
                return
            active, step = planned
            gaps = [row.front.removed for row in active]
            tokens = [
                row.span(span.past + gap, span.total + gap)
                for row, span, gap in zip(active, step.spans, gaps, strict=True)
            ]
            ids = torch.from_numpy(np.concatenate(tokens).astype(np.int64))
            self._has_looked = False
            logits = self._runner.run(step, ids, [row.key for row in active], gaps)
            if step.fills_blocks:
                for row, span in zip(active, step.spans, strict=True):
                    row.verify(self._present_name(), span.total)
            step.commit()
        except BaseException as error:
            if step is not None:
                step.abandon()
            if not isinstance(error, Exception):  # a panic, or somebody's exit: the end of this lane
                raise
            out.error = error  # the model's code may raise anything
            self._fail(list(active), error, out)
            return
        out.num_tokens = step.num_tokens
        for row, span in zip(active, step.spans, strict=True):
            row.pending -= span.count
            row.computed()
        self._choose(active, logits, out)

    def _plan(self, out: Outcome) -> tuple[list[Running], Step] | None:
        """Plan a step of all rows, or of as many as there are pages for, the first in rank."""
        while self.rows:
            active, counts, tokens = self._shares()
            try:
                step = Step.plan(self._storage, self._batch, counts, tokens=tokens)
            except CapacityError as error:
                if len(self.rows) > 1:
                    self._preempt(max(self.rows, key=lambda row: row.rank), out)
                elif not self._reopen_aligned(self.rows[0]):
                    self._fail(self.rows, error, out)
                continue
            for row in active:
                if row.next is not None:  # appended by the plan
                    row.pending, row.next = 1, None
            return active, step
        return None

    def _shares(self) -> tuple[list[Running], npt.NDArray[np.int32] | None, npt.NDArray[np.uint32] | None]:
        """Return who takes part, with how many tokens each, or with which one: a step of decoding alone."""
        chosen = [row.next for row in self.rows if row.next is not None]
        if len(chosen) == len(self.rows):
            return self.rows[:], None, np.array(chosen, np.uint32)
        for row in self.rows:
            if row.next is not None and row.sequence is not None:
                row.sequence.append(np.array([row.next], np.uint32))
                row.pending, row.next = 1, None
        counts = np.array([int(row.pending == 1) for row in self.rows], np.int32)
        left = max(self._budget - int(counts.sum()), 0 if counts.any() else 1)
        if (most := self._storage.most_new(1)) is not None:
            left = min(left, max(most - len(self.rows) * self._pool.block_size, 1))
        for index, row in sorted(enumerate(self.rows), key=lambda item: item[1].rank):
            if row.pending > 1:
                counts[index] = row.next_pass() if self._is_exact and left > 0 else min(row.pending, left)
                left = max(left - int(counts[index]), 0)
        return [row for row, count in zip(self.rows, counts, strict=True) if count], counts, None

    def _preempt(self, row: Running, out: Outcome) -> None:
        self._remove(row)
        self._full = True
        row.preemptions += 1
        out.preemptions += 1
        out.waiting.append(row)

    def _reopen_aligned(self, row: Running) -> bool:
        """Let go of a page that the last row reuses in part: it pins one page more than the row needs.

        Returns False when that was done before: the pages are held by others, then.
        """
        if row.aligned:
            return False
        assert row.sequence is not None
        self._batch.remove(row.sequence)
        self._batch.add(row.open(self._pool, align=self._pool.block_size))
        row.aligned = True
        return True

    def _fail(self, rows: Sequence[Running], error: Exception, out: Outcome) -> None:
        for row in list(rows):
            self._remove(row)
            out.failed.append((row, error))

    def _choose(self, active: list[Running], logits: torch.Tensor, out: Outcome) -> None:
        """Choose a token for every row whose last known token was computed."""
        ready = [index for index, row in enumerate(active) if row.pending == 0]
        if not ready:
            return
        rows = [active[index] for index in ready]
        chosen = sample(logits if len(ready) == len(active) else logits[ready], [r.sampling for r in rows])
        for row, token in zip(rows, chosen, strict=True):
            try:
                piece, reason = row.accept(token)
            except Exception as error:  # noqa: BLE001  # a tokenizer may raise anything
                self._fail([row], error, out)
                continue
            out.pieces.append((row, piece, reason))
            if reason is not None:
                self._remove(row, is_done=True)
