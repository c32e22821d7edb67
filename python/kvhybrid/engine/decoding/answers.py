"""Decoding one answer id by id: with the steps of a decoder, or, where those are not known, by windows.

Knows ids and what makes a token or a text of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

from kvhybrid.engine.decoding.of_tokens import NO_TEXT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvhybrid.engine.decoding.steps import Steps

__all__ = ["ByToken", "Decoding", "Windows"]

# A character has at most 4 bytes: what is unfinished after so many tokens will never be one.
MAX_UNFINISHED: Final = 16


class Decoding(Protocol):
    """One answer's text while its tokens come."""

    def push(self, token: int) -> str:
        """Take one more token, and return the text that it adds and no later token can change."""

    def end(self) -> str:
        """Return the text that was held back. Nothing may be pushed behind it."""

    def peek(self) -> str:
        """Return the text that ``end`` would return, and change nothing."""


class ByToken:
    """Decodes token by token; ``token_of`` returns the token of an id, None for one that has no text."""

    def __init__(self, token_of: Callable[[int], str | None], steps: Steps) -> None:
        self._token_of = token_of
        self._steps = steps
        self.end = steps.end
        self.peek = steps.peek

    def push(self, token: int) -> str:
        found = self._token_of(token)
        return "" if found is None else self._steps.push(found)


class Windows:
    """Decodes the last few tokens again with every new one; ``decode`` makes a text of a list of ids.

    For tokenizers in Python, and for decoders that are not known by their parts. Pieces joined are the text
    of all ids wherever a token's text depends on the few tokens before it. Where it does not, the end of the
    answer brings what is missing, if what was given out begins the text. ``steps`` take the text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], steps: Steps) -> None:
        self._decode = decode
        self._steps = steps
        self._ids: list[int] = []
        self._context: list[int] = []  # the last tokens that had a text: some tokenizers join words
        self._silent: list[int] = []  # the last token behind them, if it had none
        self._waiting: list[int] = []  # what is not decoded yet
        self._before = ""  # the text of the context
        self._given: list[str] = []

    def push(self, token: int) -> str:
        self._ids.append(token)
        self._waiting.append(token)
        whole = self._whole()
        if len(self._waiting) < MAX_UNFINISHED and whole != self._before and not self._is_finished(whole):
            return ""
        waiting, self._waiting = self._waiting, []
        added = whole[len(self._before) :]
        if not added:
            self._silent = waiting[-1:]
            return ""
        self._context, self._silent = waiting, []
        self._before = self._decode(waiting)
        self._given.append(added)
        return self._steps.push(added)

    def end(self) -> str:
        given = "".join(self._given)
        whole = self._decode(self._ids) if self._ids else ""
        rest = whole[len(given) :] if whole.startswith(given) else self._rest()
        return self._steps.push(rest) + self._steps.end()

    def peek(self) -> str:
        steps = self._steps.copy()
        return steps.push(self._rest()) + steps.end()

    def _whole(self) -> str:
        return self._decode([*self._context, *self._silent, *self._waiting])

    def _rest(self) -> str:
        return self._whole()[len(self._before) :] if self._waiting else ""

    def _is_finished(self, whole: str) -> bool:
        return whole.startswith(self._before) and not whole.endswith(NO_TEXT)
