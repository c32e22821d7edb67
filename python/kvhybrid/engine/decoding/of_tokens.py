"""Decoders of the tokenizers library that take one token after the other.

ByteFallback     "<0xE2>"  "<0x82>"  "<0xAC>"  "a"      gives    ()  ()  ()  ("€", "a")
the same         "<0xE2>"  "<0x82>"  "a"                gives    ()  ()  ("?", "?", "a")
"""

from __future__ import annotations

import codecs
import re
from typing import TYPE_CHECKING, Final

from tokenizers import Regex
from tokenizers.decoders import Replace

from kvhybrid.engine.decoding.steps import Plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = [
    "NO_TEXT",
    "Bytes",
    "FallbackBytes",
    "Replaced",
    "ReplacedPattern",
    "Sounds",
    "Spaced",
    "Spaces",
    "Stripped",
    "Suffixes",
    "WordPieces",
]

NO_TEXT: Final = "\ufffd"
"""What stands in a text for bytes that are no character."""

# As the library reads them, which takes a plus sign for a digit.
BYTE: Final = re.compile(r"<0x([0-9A-Fa-f+][0-9A-Fa-f])>")


class Spaced(Plain):
    """No decoder: tokens with spaces between them."""

    _is_first = True

    def push(self, part: str) -> Iterable[str]:
        first, self._is_first = self._is_first, False
        return (part if first else f" {part}",)


class Bytes:
    """``ByteLevel``: the characters of a token stand for bytes, those of all tokens are one text."""

    def __init__(self) -> None:
        self._held = b""  # the beginning of a character, 3 bytes at most

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def push(self, part: str) -> Iterable[str]:
        try:
            added = bytes([BYTE_OF[character] for character in part])
        except KeyError:  # a token that was added as it is
            added = part.encode("utf-8", "replace")
        held = self._held + added
        text, read = codecs.utf_8_decode(held, "replace", False)
        self._held = held[read:]
        return (text,) if text else ()

    def end(self) -> Iterable[str]:
        text, self._held = self._held.decode("utf-8", "replace"), b""
        return (text,) if text else ()


class FallbackBytes:
    """``ByteFallback``: a run of tokens that stand for bytes is one text, or as many unknown characters.

    Whether it is a text is known once the run has ended, so that it is held back until then.
    """

    def __init__(self) -> None:
        self._held = b""

    @property
    def holds(self) -> bool:
        return bool(self._held)

    def push(self, part: str) -> Iterable[str]:
        if (found := BYTE.fullmatch(part)) is not None:
            self._held += bytes([int(found[1], 16)])
            return ()
        return (*self.end(), part) if self._held else (part,)

    def end(self) -> Iterable[str]:
        held, self._held = self._held, b""
        try:
            return (held.decode(),) if held else ()
        except UnicodeDecodeError:
            return [NO_TEXT] * len(held)


class Spaces(Plain):
    """``Metaspace``: a mark stands for a space, and for nothing in the first token (or text)."""

    def __init__(self, mark: str, first: str, later: str = " ") -> None:
        self._mark = mark
        self._now = first
        self._later = later

    def push(self, part: str) -> Iterable[str]:
        found, self._now = part.replace(self._mark, self._now), self._later
        return (found,)


class WordPieces(Plain):
    """``WordPiece``: a space before each token that begins a word."""

    def __init__(self, prefix: str, clean_up: Sequence[tuple[str, str]]) -> None:
        self._prefix = prefix
        self._clean_up = clean_up
        self._is_first = True

    def push(self, part: str) -> Iterable[str]:
        if not self._is_first:
            part = part[len(self._prefix) :] if part.startswith(self._prefix) else f" {part}"
        self._is_first = False
        return (_replaced(part, self._clean_up),)


class Suffixes:
    """``BPEDecoder``: a suffix stands for a space, and for nothing in the last token."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._held: str | None = None  # the last token so far

    @property
    def holds(self) -> bool:
        return self._held is not None

    def push(self, part: str) -> Iterable[str]:
        held, self._held = self._held, part
        return () if held is None else (held.replace(self._suffix, " "),)

    def end(self) -> Iterable[str]:
        held, self._held = self._held, None
        return () if held is None else (held.replace(self._suffix, ""),)


class Sounds(Plain):
    """``CTC``: a token that is said twice in a row counts once, padding not at all."""

    def __init__(self, replacements: Sequence[tuple[str, str]]) -> None:
        self._replacements = replacements
        self._last: str | None = None

    def push(self, part: str) -> Iterable[str]:
        if part == self._last:
            return ()
        self._last = part
        found = _replaced(part, self._replacements)
        return (found,) if found else ()


class Replaced(Plain):
    """``Replace`` within each token."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new = old, new

    def push(self, part: str) -> Iterable[str]:
        return (part.replace(self._old, self._new),)


class ReplacedPattern(Plain):
    """``Replace`` of a pattern within each token: the library's own, because it has patterns of its own."""

    def __init__(self, pattern: str, new: str) -> None:
        self._decoder = Replace(Regex(pattern), new)

    def push(self, part: str) -> Iterable[str]:
        return (self._decoder.decode([part]),)


class Stripped(Plain):
    """``Strip`` of each token."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._start, self._stop = content, start, stop

    def push(self, part: str) -> Iterable[str]:
        first, last = 0, len(part)
        while first < min(self._start, len(part)) and part[first] == self._content:
            first += 1
        while last > max(first, len(part) - self._stop) and part[last - 1] == self._content:
            last -= 1
        return (part[first:last],)


def _replaced(text: str, replacements: Iterable[tuple[str, str]]) -> str:
    for old, new in replacements:
        text = text.replace(old, new)
    return text


def _bytes_of_characters() -> dict[str, int]:
    """Return the byte that each character of a byte-level vocabulary stands for, as GPT-2 chose them."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(0x100) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


BYTE_OF: Final = _bytes_of_characters()
