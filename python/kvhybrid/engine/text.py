"""Turning tokens back into text while they come: pieces of whole characters, and where to stop.

Knows our tokenizer and nothing of requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from kvhybrid.engine.stops import StopSearch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvhybrid.engine.own_tokenizer import OwnTokenizer

__all__ = ["Detokenizer", "Piece"]


class Piece(str):
    """The text that one token added; may be empty. Pieces joined are the answer's text."""

    __slots__ = ("token_id",)
    token_id: int

    def __new__(cls, text: str, token_id: int) -> Self:
        """Return ``text`` as the piece of a token."""
        piece = super().__new__(cls, text)
        piece.token_id = token_id
        return piece


class Detokenizer:
    """Decodes one answer token by token.

    Pieces joined are what the tokenizer decodes all of its tokens to, special tokens left out; with ``stops``
    only what lies before the first that is complete. What a later token may still change is held back, and so
    is what may turn out to begin a stop string.
    """

    def __init__(self, tokenizer: OwnTokenizer | None, stops: Sequence[str] = ()) -> None:
        self._decoding = None if tokenizer is None else tokenizer.decoding()
        self._specials = {} if tokenizer is None else tokenizer.special_tokens
        self._search = StopSearch(stops, self._specials.values()) if stops and tokenizer else None
        self._num_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._search is not None and self._search.stopped

    def push(self, token: int, *, last: bool = False) -> str:
        """Take one more token and return the text it adds; ``last`` gives out whatever was held back."""
        self._num_tokens += 1
        if (decoding := self._decoding) is None:
            return ""
        text = decoding.push(token)
        if last:
            text += decoding.end()
        if self._search is None:
            return text
        special = self._specials.get(token)
        waiting = "" if last else decoding.peek()
        shown = self._search.push(text, special, waiting=waiting)
        return shown + self._search.end() if last and not self._search.stopped else shown

    def num_kept_tokens(self) -> int:
        """Return how many tokens lie wholly before the stop string; all of them without one."""
        return self._num_tokens if self._search is None else self._search.num_kept_tokens()
