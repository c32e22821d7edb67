"""Decoders of the tokenizers library behind the one that joins tokens: they take the text in pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["ReplacedText", "StrippedText"]


class ReplacedText:
    """``Replace`` in the whole text: what may begin what is replaced is held back."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new
        self._held = ""

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def push(self, part: str) -> Iterable[str]:
        *before, rest = (self._held + part).split(self._old)
        count = next(
            (n for n in range(min(len(self._old) - 1, len(rest)), 0, -1) if rest.endswith(self._old[:n])), 0
        )
        self._held = rest[len(rest) - count :]
        found = self._new.join([*before, rest[: len(rest) - count]])
        return (found,) if found else ()

    def end(self) -> Iterable[str]:
        held, self._held = self._held, ""
        return (held,) if held else ()


class StrippedText:
    """``Strip`` of the whole text."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._left, self._stop = content, start, stop
        self._held = ""

    @property
    def holds(self) -> bool:
        return False  # what is held is what the end strips

    def push(self, part: str) -> Iterable[str]:
        while self._left and part:
            if part[0] != self._content:
                self._left = 0
            else:
                part, self._left = part[1:], self._left - 1
        part = self._held + part
        last = len(part)
        while last > max(0, len(part) - self._stop) and part[last - 1] == self._content:
            last -= 1
        self._held = part[last:]
        return (part[:last],) if last else ()

    def end(self) -> Iterable[str]:
        return ()
