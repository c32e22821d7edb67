"""``SessionRows``: one session's text from prompt to prompt, and the forward pass under way.

Between calls a session remembers tokens and holds no page (*released*); a call takes the pages back, or
has what was evicted meanwhile computed again. Knows rows, steps and who may use them at once; no model,
and nothing of ``transformers``.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import numpy as np

from kvhybrid.cache.compress.selection import RECENT
from kvhybrid.errors import InvalidRequestError, UnsupportedError
from kvhybrid.model.compressed import go_on
from kvhybrid.model.grid import Grid
from kvhybrid.model.ownership import Ownership
from kvhybrid.model.padding import has_padding, read_ids, read_padding
from kvhybrid.model.passes import bounded
from kvhybrid.model.released import NOTHING, Released
from kvhybrid.model.rows import Fed, Rows
from kvhybrid.model.session_retention import SessionRetention
from kvhybrid.model.verification import Verification

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from kvhybrid.cache.kv_cache import KVCache
    from kvhybrid.cache.step import Step
    from kvhybrid.model.observed import Observed
    from kvhybrid.model.padding import Ids
    from kvhybrid.model.routes import Reader
    from kvhybrid.model.rows import Text
    from kvhybrid.model.session_states import SessionStates
    from kvhybrid.model.verification import Weights


class SessionRows:
    """One conversation, or a batch of them: what is held of it, and the step under way.

    ``grid``: forward passes end at multiples of it, and nothing computed otherwise is ever shared
    (``reproducible``); 0 for none. ``mixes_rows``: K and V of one row depend on the others' (experts).
    ``states``: those of layers that keep one, where the model has such layers. ``observed``: where the
    queries of the last tokens are kept, for a compression that asks for them.
    """

    def __init__(
        self,
        cache: KVCache,
        reader: Reader,
        weights: Weights,
        *,
        vocab_size: Callable[[], int],
        name: str,
        grid: int = 0,
        mixes_rows: bool = False,
        states: SessionStates | None = None,
        observed: Observed | None = None,
    ) -> None:
        self.cache = cache
        self.reader = reader
        self.name = name
        self.step: Step | None = None
        self.rows: Rows | None = None
        self.cached: list[int] = []
        self.grid = Grid(grid)
        self.states = states
        self.observed = observed
        self.retention = SessionRetention(cache.pool)
        self._verification = Verification(weights)
        self._vocab_size = vocab_size
        self._mixes_rows = mixes_rows
        self._released = NOTHING
        self._reopening = NOTHING
        self._fed: Fed | None = None
        self._width = 0  # columns of the step under way
        self._each = 1  # how often it repeats the rows that there were before it
        self.owner = Ownership(name, weakref.WeakMethod(self._end))

    @property
    def vocab_size(self) -> int:
        """Token ids that the model has embeddings for now."""
        return self._vocab_size()

    @property
    def num_rows(self) -> int:
        """Rows of the batch, 0 before the first prompt."""
        return len(self.rows if self.rows is not None else self._released.texts)

    @property
    def columns(self) -> int:
        """The length that ``transformers`` sees, padding included."""
        return self.rows.columns if self.rows is not None else self._released.columns

    @property
    def gap(self) -> int:
        """Columns by which what is stored is narrower than what is held: of a compressed context."""
        return self.rows.gap if self.rows is not None else 0

    def text(self) -> Released:
        """Return what is computed of every row, pages or not."""
        if self.rows is None:
            return self._released
        return Released.of(self.rows)

    def prepare(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Take a whole prompt, before it is sliced: line the rows up with what is cached of it.

        ``input_ids`` ``[batch, tokens]``; with a ``mask`` that is longer, they continue the session's text.
        Afterwards ``columns`` says how many columns need not be computed.
        """
        self.owner.check_open()
        ids = read_ids(input_ids, self.vocab_size)
        batch, width = ids.shape
        if self.rows is not None and self.rows.is_compressed and self._verification.look():
            self._let_go()
        if mask is not None and mask.dim() == 2 and mask.shape[1] > width:
            # The text so far is left as it is, and ``begin`` appends the new tokens to it.
            if self.num_rows != batch or mask.shape[1] != self.columns + width:
                raise InvalidRequestError(
                    f"attention_mask is {list(mask.shape)} for input_ids {list(ids.shape)}, but the session "
                    f"holds {self.num_rows} rows of {self.columns} columns: pass the whole prompt"
                )
            return
        pads = read_padding(mask, batch, width)
        texts = [ids[row, pad:].astype(np.uint32) for row, pad in enumerate(pads)]
        if self._go_on(texts, pads):
            return
        rows = self._open(texts, pads)
        if self.observed is not None:
            # What is compressed must not depend on what was cached: so many queries are always seen.
            self.observed.forget()
            rows.reconsider(width - RECENT)
            self.cached = [row.length for row in rows.sequences]

    def _go_on(self, texts: list[Text], pads: list[int]) -> bool:
        """Continue a compressed context, if the prompt begins with it; else its text is computed again."""
        rows, columns = self.rows, self.columns
        if rows is None or not rows.is_compressed or (chosen := go_on(rows, texts, pads)) is None:
            return False
        if self.observed is not None:
            self.observed.select(chosen)
            self.observed.crop(columns - rows.columns)
        self.reader.forget(0)
        self.cached = [rows.columns - pad for pad in pads]
        return True

    def _open(self, texts: list[Text], pads: list[int], *, reuse: bool = True) -> Rows:
        """Open rows in place of those held; new ones first, so that shared pages do not leave in between."""
        share = True
        parts: tuple[str, ...] = ()
        if self.grid.width and (len(texts) > 1 or any(pads)):
            # A batch of another shape adds up in another order, and padding moves a text's passes.
            parts = ("batch", repr(pads))
            share = len(texts) == 1 or not self._mixes_rows
        namespace = self._verification.open(*parts, texts=texts)
        rows = Rows.open(
            self.cache,
            texts,
            pads,
            namespace,
            reuse=reuse and share,
            share=share,
            grid=self.grid.width or 1,
            states=self.states,
        )
        # What is computed from here on is sealed only once the model was looked at again.
        rows.require_verification()
        old, self.rows, self._released = self.rows, rows, NOTHING
        if old is not None:
            old.close()
        self.grid.begin(rows.columns)
        self.cached = [row.length for row in rows.sequences]
        self.retention.begin(namespace, texts, self.cached)
        self.reader.forget(0)
        return rows

    def stops(self, width: int, batch: int = 1) -> list[int]:
        """Return the columns at which forward passes over the next ``width`` columns must end.

        ``batch``: rows of the call, of which there may be more than are held.
        """
        start, stop = self.columns, self.columns + width
        stops = [*(self.grid.stops(start, stop) or self._state_stops(start, stop)), stop]
        most = self.cache.storage.most_new(batch)
        return stops if most is None else bounded(start, stops, most)

    def _state_stops(self, start: int, stop: int) -> list[int]:
        if self.states is None or self.grid.width:
            return []
        # Of a text that was not prepared nothing is known yet, padding included: its first pass is not cut.
        if self.rows is None:
            return []
        is_last = self.rows.pending <= stop - start
        return self.states.cuts(min(self.rows.pads), start, stop, is_last=is_last)

    def reopen(self, *, looks: bool = False) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Take the pages back after ``release``, and give up those of a model that has changed since.

        ``looks``: look at the model now; without it only what was seen when pages were sealed counts. Returns
        ``(input_ids, attention_mask)`` of columns that are lost and must be computed again first, or None.
        """
        # Inside a call of ``generate`` the text goes on over what it began with, as with any other cache.
        is_direct = self.rows is not None and self.owner.depth == 1
        if is_direct and (self._verification.look() if looks else self._verification.is_stale):
            self.finish(success=False)
            self._let_go()
        released = self._released
        if self.rows is not None or not released.texts:
            return None
        # One more token than is held: ``open`` leaves the last one to compute.
        rows = self._open([np.append(text, np.uint32(0)) for text in released.texts], released.pads)
        for row, text in zip(rows.sequences, released.texts, strict=True):
            row.truncate(len(text))
        if rows.columns >= released.columns:
            rows.columns = released.columns
            return None
        self._reopening = released
        return released.behind(rows.columns)

    def stay_released(self) -> None:
        """Undo a ``reopen`` whose lost columns could not be computed again."""
        self._drop_rows()
        self._released = self._reopening

    def begin(self, input_ids: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Plan the forward pass over ``input_ids`` ``[batch, tokens]``, which follow what is cached.

        Raises ``InvalidRequestError`` when they do not, ``CapacityError`` when the pages do not suffice;
        the session is then as it was.
        """
        self.owner.check_open()
        self._check_idle()
        ids = read_ids(input_ids, self.vocab_size)
        batch, width = ids.shape
        if mask is not None and mask.dim() != 2:
            raise UnsupportedError(
                f"attention_mask has {mask.dim()} dimensions; a session takes [batch, tokens] only"
            )
        rows, is_new = self.rows, self.rows is None
        if rows is None:
            pads = read_padding(mask, batch, width)
            texts = [ids[row, pad:].astype(np.uint32) for row, pad in enumerate(pads)]
            rows = self._open(texts, pads, reuse=False)
        if batch % len(rows):
            raise InvalidRequestError(
                f"input_ids has {batch} rows, the session was begun with {self.num_rows}"
            )
        self._each = batch // len(rows)
        if self._each > 1:
            self.repeat(self._each)
        try:
            self._plan(rows, ids, mask)
        except BaseException:
            if is_new:
                self._drop_rows()
            self._unrepeat()
            raise
        self._start(rows.columns - rows.gap)

    def _plan(self, rows: Rows, ids: Ids, mask: torch.Tensor | None) -> None:
        width = ids.shape[1]
        if mask is not None and not has_padding(mask, rows.pads, rows.columns + width):
            raise UnsupportedError("attention_mask hides other tokens than when the session was begun")
        self.grid.bound(rows, width)
        fed = rows.feed(ids)
        try:
            self.step = rows.plan(fed)
        except BaseException:
            if fed.is_new:
                rows.take_back()
            raise
        self._fed, self._width = fed, width

    def _unrepeat(self) -> None:
        """Undo what ``begin`` repeated."""
        each, self._each = self._each, 1
        if each > 1:
            self.select(list(range(0, self.num_rows, each)))

    def _check_idle(self) -> None:
        if self.step is not None:
            raise InvalidRequestError("a forward pass of this session is still under way")

    def _start(self, columns: int) -> None:
        self.reader.start(columns)
        if self.states is not None:
            self.states.live.settle()

    def finish(self, *, success: bool) -> None:
        """End the forward pass: its K and V count, or they never happened."""
        step, self.step = self.step, None
        fed, self._fed = self._fed, None
        if step is None or fed is None or self.rows is None:
            return
        try:
            if success:
                self._commit(step, self.rows)
                return
            step.abandon()
        except UnsupportedError:  # from commit, which has abandoned the step
            self._forget_step(self.rows, fed)
            raise
        self._forget_step(self.rows, fed)

    def _commit(self, step: Step, rows: Rows) -> None:
        is_verified = self._verification.verify(rows, step)
        if self.states is not None and (left_out := self.states.live.left_out()):
            step.abandon()
            raise UnsupportedError(f"the forward pass left out layers that keep a state: {left_out}")
        step.commit()
        if self.observed is not None:
            self.observed.settle(success=True)
        self.grid.advance(rows, self._width)
        rows.columns += self._width
        if self.states is not None and is_verified and self.grid.is_exact(rows.columns):
            self.states.keep(list(zip(rows.pads, rows.sequences, strict=True)), self._width)

    def _forget_step(self, rows: Rows, fed: Fed) -> None:
        if fed.is_new:
            rows.take_back()
        if self.observed is not None:
            self.observed.settle(success=False)
        self.reader.forget(rows.columns - rows.gap)
        self._unrepeat()
        if self.states is not None:
            # Layers have gone on while the pass ran: their states are of no text, and computed again.
            self._let_go()

    def rewind(self, before: tuple[int, list[Text]] | None) -> None:
        """Go back to what ``mark`` returned; None: to a session without text."""
        if before is None:
            self.reset()
            return
        columns, known = before
        if self.num_rows != len(known):  # its first pass repeated them
            self.select(list(range(0, self.num_rows, self.num_rows // len(known))))
        self.grid.crop(columns)
        self.reader.forget(columns - self.gap)
        if self.observed is not None:
            self.observed.crop(self.columns - columns)
        if self.rows is None:
            self._released = self._released.crop(columns)
            return
        self.rows.rewind(columns, known)
        if self.states is not None:
            self._let_go()

    def mark(self) -> tuple[int, list[Text]] | None:
        """Return where the session stands, for ``rewind``."""
        return None if self.rows is None else (self.rows.columns, self.rows.known())

    def release(self) -> None:
        """Unpin the pages and remember the tokens: a session that nobody runs holds no page.

        But of compressed ones, which nobody else could find: it holds them until there is no room.
        """
        self.finish(success=False)
        if self.rows is not None and self.rows.is_compressed:
            self.rows.take_back()
            self.reader.forget(0)
            self.cache.compressed.rest(self)
            return
        self._let_go()

    def replace(self, rows: Rows) -> None:
        """Hold ``rows``, of the same text, in place of those held."""
        old, self.rows = self.rows, rows
        if old is not None:
            self._verification.settle(old)
            old.close()
        self.reader.forget(0)
        self.cache.storage.settled()
        self.cache.compressed.rest(self)

    def let_go(self) -> bool:
        """Give compressed pages up for others' sake, unless they are in use; the text is computed again."""
        return self.owner.try_alone(self._give_up)

    def _give_up(self) -> bool:
        if self.rows is None or not self.rows.is_compressed:
            return False
        self._let_go()
        return True

    def _let_go(self) -> None:
        if self.rows is not None:
            released = self.text()
            self._verification.settle(self.rows)
            self.retention.let_go(self.rows.sequences)
            self._drop_rows()
            self._released = released
            self.retention.rest(released.texts)

    def _drop_rows(self) -> None:
        rows, self.rows = self.rows, None
        if rows is not None:
            rows.close()
        self.reader.forget(0)
        if self.states is not None:
            self.states.reset()
        self.cache.storage.settled()

    def _end(self) -> None:
        """Let go for good: what was retained for the text is wanted no more."""
        self.finish(success=False)
        self._let_go()
        self.retention.retire(self._released.texts)
        self.reset()

    def reset(self) -> None:
        """Forget the text."""
        self.finish(success=False)
        if self.observed is not None:
            self.observed.forget()
        self._drop_rows()
        self._released = NOTHING
        self.retention.forget()

    def restore(self, text: Released) -> None:
        """Take a text in place of the session's own; its pages are looked for by whoever goes on."""
        self.reset()
        self._released = text

    def crop(self, columns: int) -> None:
        """Drop every column from ``columns`` on."""
        self._check_idle()
        self.grid.crop(columns)
        if self.states is not None and not self.states.live.crop(self.columns - columns, self.columns):
            if columns >= self.columns:
                return
            self._let_go()  # a state cannot be taken back: the next pass goes on from one that was kept
        if self.observed is not None:
            self.observed.crop(self.columns - columns)
        if self.rows is not None and not self.rows.can_crop(columns):
            self._let_go()  # heads hold different tokens there: the text is computed again
        if self.rows is None:
            self._released = self._released.crop(columns)
            return
        self.rows.crop(columns)
        self.reader.forget(columns - self.gap)

    def select(self, chosen: list[int]) -> None:
        """Keep these rows, in this order; a row taken twice is forked, not copied."""
        self._check_idle()
        if self.observed is not None:
            self.observed.select(chosen)
        if self.rows is None:
            self._released = self._released.select(chosen)
            return
        pads = self.rows.pads
        self.rows.select(chosen)
        self.grid.is_shared &= self.rows.pads == pads
        self.reader.reorder(chosen)
        if self.states is not None:
            self.states.select(chosen)

    def repeat(self, repeats: int) -> None:
        """Fork every row ``repeats - 1`` times, forks beside their row."""
        self.select([row for row in range(self.num_rows) for _ in range(repeats)])

    def copy_to(self, other: SessionRows) -> None:
        """Give ``other``, a fresh session of the same model and tenant, this one's text and pages."""
        self._check_idle()
        self.owner.check_open()
        other.rows = self.rows.fork() if self.rows is not None else None
        if self.rows is not None and self.states is not None and other.states is not None:
            self.states.copy_to(other.states, len(self.rows))
        if self.observed is not None and other.observed is not None:
            self.observed.copy_to(other.observed)
        other.cached, other._released = list(self.cached), self._released
        if other.rows is not None and other.rows.is_compressed:
            other.cache.compressed.rest(other)
        other.grid.follow(self.grid)
        other.retention.follow(self.retention)
        other._verification.follow(self._verification)

    def materialise(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return copies ``[batch, num_kv_heads, columns, width]`` of a layer's K and V, zeros for padding.

        Of a compressed context, what is left of it. Raises ``InvalidRequestError`` when pages were evicted
        while the session held none, or when it has no state to go on from.
        """
        return self.take_pages().materialise(layer)

    def take_pages(self) -> Rows:
        """Return the rows with all their pages; raises as ``materialise`` does."""
        if self.reopen() is not None:
            self.stay_released()
            lost = "pages" if self.states is None else "pages or states"
            raise InvalidRequestError(
                f"{lost} of session {self.name!r} were evicted: run it through generate or forward first"
            )
        if self.rows is None:
            raise InvalidRequestError(f"session {self.name!r} holds nothing yet")
        return self.rows
