"""Rows whose beginning was compressed: what stands for it, and going on from there.

    text      0 1 2 3 . . . . . . . . . . . . 60 61 62 ...       all tokens, ``columns`` counts them
    pages     0 1 2 3 9 17 | 28 29 ... 60 61 62 ...              head 0: 0 1 2 3 9 17, head 1: 0 1 2 3 5 20
              <- stored -->  <- behind the front: token by token, as ever

The front is what heads hold different tokens of. Behind it every head holds every token, in order, so a text
can be cut there, but not within.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from kvhybrid.model.rows import Rows, Text


@dataclass(frozen=True, slots=True)
class Front:
    """A row's compressed beginning: its ``text``, and how many tokens of it each head has ``stored``."""

    text: Text
    stored: int

    @property
    def removed(self) -> int:
        """Tokens that are no longer there: by so many the pages hold less than the text."""
        return len(self.text) - self.stored


WHOLE: Final = Front(np.empty(0, np.uint32), 0)


def go_on(rows: Rows, texts: list[Text], pads: list[int]) -> list[int] | None:
    """Line compressed ``rows`` up with a prompt that begins as they do; what lies behind becomes pending.

    Returns which rows they were, in the prompt's order (after beam search there are more than the prompt
    has), or None when some text of the prompt does not begin with a compressed front: nothing has changed
    then. The last token is left to compute.
    """
    held = rows.held()
    chosen: list[int] = []
    cut = min(pad + len(text) for text, pad in zip(texts, pads, strict=True)) - 1
    for text, pad in zip(texts, pads, strict=True):
        shared = {row: shared_tokens(held[row], text) for row in range(len(rows)) if rows.pads[row] == pad}
        if not shared:
            return None
        best = max(shared, key=lambda row: shared[row])
        chosen.append(best)
        cut = min(cut, pad + shared[best])
    if any(cut - rows.pads[row] < len(rows.fronts[row].text) for row in chosen):
        return None
    if chosen != list(range(len(rows))):
        rows.select(chosen)
    rows.crop(cut)
    for row, text, pad in zip(rows.sequences, texts, pads, strict=True):
        row.append(text[cut - pad :])
    return chosen


def shared_tokens(held: Text, text: Text) -> int:
    """Return how many leading tokens of two texts are equal."""
    length = min(len(held), len(text))
    differs = np.flatnonzero(held[:length] != text[:length])
    return int(differs[0]) if len(differs) else length
