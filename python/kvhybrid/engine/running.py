"""``Running``: one request from its place in the queue to its last token.

Touched by the lane's thread while it runs; the event loop reads it before and after, and in between
only sets ``cancelled``. Knows tokens and text; no tensors and no event loop.
"""

from __future__ import annotations

import itertools
import math
import time
from typing import TYPE_CHECKING

import numpy as np

from kvhybrid.engine.expectations import said_at_end
from kvhybrid.engine.scheduler import rank_of
from kvhybrid.engine.text import Detokenizer, Piece
from kvhybrid.errors import KVHybridError
from kvhybrid.model.compressed import WHOLE
from kvhybrid.model.sampling import Sampling
from kvhybrid.model.shorten import Computed

if TYPE_CHECKING:
    from typing import TypeAlias

    import numpy.typing as npt

    from kvhybrid._core import PagePool, Sequence
    from kvhybrid.engine.door import Prompt
    from kvhybrid.engine.own_tokenizer import OwnTokenizer
    from kvhybrid.engine.request import Request
    from kvhybrid.model.tenancy import Tenancy
    from kvhybrid.model.weights import StateName

    Rank: TypeAlias = tuple[float, int]

__all__ = ["Running"]

_arrivals = itertools.count()


class Running:
    """One request's tokens, its pages while it has any, and how far its answer is.

    ``tokens`` holds the prompt and everything generated, so that a preempted request can be opened
    again and go on as if nothing had been. With a ``grid`` (``reproducible``) they are computed in the
    same forward passes whatever is cached and whatever else runs. A conversation's ``front`` may have fewer
    tokens stored than it has: positions count the text's, pages hold what is left.
    """

    def __init__(
        self,
        request: Request,
        prompt: Prompt,
        *,
        tenancy: Tenancy,
        end_ids: frozenset[int],
        tokenizer: OwnTokenizer | None,
        arrived: float = 0.0,
        grid: int = 0,
    ) -> None:
        self.key = next(_arrivals)
        self.request = request
        deadline = request.deadline if request.deadline is not None else math.inf
        self.rank: Rank = (rank_of(arrived, deadline, request.priority), self.key)
        self.prompt = prompt
        self.tokens = prompt.tokens
        self.num_prompt_tokens = len(prompt.tokens)
        self.generated: list[int] = []
        self.text = Detokenizer(tokenizer, request.stop or ())
        self.sampling = Sampling.seeded(request.temperature, request.top_p, request.seed)
        self.sequence: Sequence | None = None
        self.front = WHOLE
        self.pending = 0  # tokens that the sequence knows and has not computed
        self.next: int | None = None  # the token just chosen, which the sequence does not know yet
        self.cached_tokens = 0
        self.aligned = False  # opened without reusing part of a page
        self.preemptions = 0
        self.cancelled = False
        self.first_token_at = math.nan
        self._grid = grid
        self._tenancy = tenancy
        self.namespace = tenancy.latest()
        """Where its pages are found: that of the model as it was last seen, until ``look`` is called."""
        self._is_stale = False  # the model has changed since the row was opened
        self._is_checked = True  # nothing was computed since the pages were last verified
        self.end_ids = end_ids

    def open(self, pool: PagePool, *, align: int = 1) -> Sequence:
        """Pin the longest cached prefix, or what the conversation holds; everything after it is pending.

        ``look`` comes before it and says where to search.
        """
        self.close()
        held, name = self.prompt.held, self._tenancy.name
        if held is not None and (taken := held.take(self.span(0, len(self.tokens)), name)) is not None:
            self.front = taken.front
            return self._opened(taken.sequence, len(taken.text))
        shares = self._tenancy.may_share
        align = max(align, self._grid)
        sequence = pool.open(self.tokens, self.namespace, reuse=shares, share=shares, align=align)
        sequence.require_verification()
        if self._grid:
            prompt, known = self.num_prompt_tokens, len(self.tokens)
            # What was generated may be cached as part of another prompt, computed in another way.
            keep = (prompt - 1) // self._grid * self._grid
            if sequence.length > keep:
                sequence.truncate(keep)
                sequence.append(self.span(keep, known))
            sequence.share_up_to(prompt // self._grid * self._grid)
        return self._opened(sequence, sequence.cached)

    def look(self) -> None:
        """Look at the model: the row is opened among the pages that the model would compute now."""
        self.namespace = self._tenancy.namespace(texts=[self.span(0, len(self.tokens))])
        self._is_stale = False

    @property
    def needs_check(self) -> bool:
        """True when something was computed that may be sealed only once the model was looked at."""
        return self.sequence is not None and not self._is_checked

    def computed(self) -> None:
        """Note that a step of this row was committed."""
        self._is_checked = False

    def verify(self, name: StateName | None, length: int | None = None) -> None:
        """Let the first ``length`` stored tokens be sealed, if the model is what it was at ``look``.

        ``name``: what the model is called now. Without ``length``: all that were computed.
        """
        if self.sequence is None:
            return
        self._is_stale = self._is_stale or not self._tenancy.check(name)
        if not self._is_stale:
            self.sequence.verify(self.sequence.length if length is None else length)
            self._is_checked = length is None

    def _opened(self, sequence: Sequence, found: int) -> Sequence:
        self.sequence, self.pending, self.next = sequence, sequence.pending, None
        if self.preemptions == 0:  # later it would find what it computed itself
            self.cached_tokens = found
        return sequence

    def next_pass(self) -> int:
        """Return how many pending tokens the next forward pass may compute at most."""
        if not self._grid:
            return self.pending
        past = len(self.tokens) - self.pending
        left = self.num_prompt_tokens - past
        return min(self._grid - past % self._grid, left) if left > 0 else 1

    def close(self) -> None:
        """Give the pages back, compressed ones to the conversation; the tokens stay. Idempotent."""
        if (computed := self._let_go()) is None:
            return
        if self.prompt.held is not None and computed.front.removed:
            self.prompt.held.rest(computed, None if self._is_stale else self._tenancy.name)
        else:
            computed.sequence.close()

    def finish(self) -> None:
        """Give the pages back behind the last token; a conversation's text is compressed, and held."""
        if self.sequence is not None and (said := said_at_end(self.request)) is not None:
            own_from = self.prompt.own_from
            said.of(self.sequence, start=self.cached_tokens if own_from is None else own_from)
        if self.prompt.held is None:
            self.close()
        elif (computed := self._let_go()) is not None:
            self.prompt.held.keep(computed, None if self._is_stale else self._tenancy.name)

    def _let_go(self) -> Computed | None:
        """Return what was computed, and be without it."""
        if self.sequence is None:
            return None
        sequence, self.sequence = self.sequence, None
        front, self.front = self.front, WHOLE
        return Computed(sequence, self.span(0, sequence.length + front.removed), front)

    @property
    def num_stored(self) -> int:
        """Tokens that need a place in pages: fewer than there are, behind a compressed front."""
        return len(self.tokens) - self.front.removed

    def match(self, pool: PagePool) -> int:
        """Return how many tokens ``open`` would find cached."""
        return min(pool.match(self.tokens, self.namespace), len(self.tokens) - 1)

    def span(self, start: int, stop: int) -> npt.NDArray[np.uint32]:
        """Return the tokens of positions ``[start, stop)``."""
        return np.frombuffer(self.tokens.tobytes(start, stop), np.uint32)

    def accept(self, token: int | None) -> tuple[Piece, str | None]:
        """Take the token chosen; return its text, and the reason to end here, if there is one.

        Raises ``KVHybridError`` for None: there was no token to choose.
        """
        if token is None:
            raise KVHybridError(f"the model gave no finite logits behind {len(self.tokens)} tokens")
        if not self.generated:
            self.first_token_at = time.perf_counter()
        self.generated.append(token)
        self.tokens.append(np.array([token], np.uint32))
        self.next = token
        ended = token in self.end_ids
        full = len(self.generated) >= self.prompt.max_length
        text = self.text.push(token, last=ended or full)
        if ended or self.text.stopped:
            return Piece(text, token), "stop"
        return Piece(text, token), "length" if full else None

    def __repr__(self) -> str:
        state = "cancelled, " if self.cancelled else ""
        return f"<Running {self.key}: {state}{self.num_prompt_tokens} + {len(self.generated)} tokens>"
