"""Turning tokens back into text while they come: pieces of whole characters, and where to stop.

Knows a tokenizer's ``decode`` and nothing of requests.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvhybrid.engine.own_tokenizer import OwnTokenizer

__all__ = ["Detokenizer", "Piece"]

# What `decode` puts in place of bytes that are no character, or not yet one.
UNFINISHED: Final = "\ufffd"
# A character has at most 4 bytes: what is unfinished after so many tokens will never be one.
MAX_UNFINISHED: Final = 16


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

    Text that may turn out to begin a stop string is held back until it does or does not:

        stop "END"    tokens  "the" " E" "N" "T"      pieces  "the" " " "" "ENT"
    """

    def __init__(self, tokenizer: OwnTokenizer | None, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._ids: list[int] = []
        self._start = 0  # decoding begins here: some tokens of context, for tokenizers that join words
        self._read = 0  # tokens before this one are decoded
        self._context = ""  # the text of tokens `_start` to `_read`
        self._held = ""
        self._ends: list[int] = []  # characters decoded once each token was
        self._decoded = 0
        self._kept = 0  # characters before the stop string
        self.stopped = False

    def push(self, token: int, *, last: bool = False) -> str:
        """Take one more token and return the text it adds; ``last`` gives out whatever was held back."""
        self._held += self._decode(token, last=last)
        if not self._stops:
            held, self._held = self._held, ""
            return held
        found = [at for at in map(self._held.find, self._stops) if at >= 0]
        if found:
            self.stopped = True
            self._kept = self._decoded - len(self._held) + min(found)
            held, self._held = self._held[: min(found)], ""
            return held
        cut = len(self._held) - (0 if last else self._doubtful())
        held, self._held = self._held[:cut], self._held[cut:]
        return held

    def num_kept_tokens(self) -> int:
        """Return how many tokens lie wholly before the stop string; all of them without one."""
        if not self.stopped:
            return len(self._ids)
        return bisect_right(self._ends, self._kept)

    def _doubtful(self) -> int:
        """Return how many of the last characters may begin a stop string."""
        longest = min(max(map(len, self._stops)) - 1, len(self._held))
        for count in range(longest, 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return count
        return 0

    def _decode(self, token: int, *, last: bool) -> str:
        self._ids.append(token)
        if self._tokenizer is None:
            return ""
        whole = self._text(self._start, len(self._ids))
        added = whole[len(self._context) :]
        waiting = len(self._ids) - self._read
        if added.endswith(UNFINISHED) and not last and waiting < MAX_UNFINISHED:
            return ""
        self._start, self._read = self._read, len(self._ids)
        self._context = self._text(self._start, self._read)
        self._decoded += len(added)
        if self._stops:
            self._ends.extend([self._decoded] * waiting)
        return added

    def _text(self, start: int, stop: int) -> str:
        assert self._tokenizer is not None
        return self._tokenizer.decode(self._ids[start:stop])
