"""Finding where an answer ends: stop strings, in its text and in its text with special tokens spelled out.

    stop "END"      tokens  "the" " E" "N" "T"          pieces  "the" " " "" "ENT"
    stop "a<end>"   tokens  "ba" <end>                  pieces  "b" ""

Knows text as it comes, and the names of special tokens between it. No tokenizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from kvhybrid.engine.decoding.of_tokens import NO_TEXT

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

__all__ = ["StopSearch"]


class Place(NamedTuple):
    """Somewhere in an answer: behind so many characters of its text, and so many special tokens."""

    characters: int
    specials: int


class Special(NamedTuple):
    """A special token in an answer."""

    place: int
    """Behind how many characters of the text."""
    name: str
    number: int
    """How many special tokens are before it."""


# Stands for special tokens in a row of which only the first and the last matter; no stop can contain it.
GAP: Final = "\ud800"


class StopSearch:
    """Takes an answer's text in pieces, and holds back what may turn out to begin a stop string.

    A special token is part of a stop wholly or not at all: "|" does not end an answer at ``<|end|>``. Some
    decoders would put a space before it: a stop with that space is found, too.
    """

    def __init__(self, stops: Sequence[str], specials: Collection[str]) -> None:
        self._stops = tuple(stops)
        self._spelled = tuple(dict.fromkeys(_spellings(stops, specials)))
        self._longest = max(map(len, self._stops))
        self._held = ""
        self._given = 0  # characters before what is held
        self._specials: list[Special] = []  # those that a stop may still contain
        self._num_specials = 0
        self._ends: list[Place] = []  # where each token ends, of those of which it is known
        self._unknown: list[int] = []  # of those of which it is not: special tokens up to their end
        self._stop: Place | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop is not None

    def push(self, text: str, special: str | None, *, waiting: str) -> str:
        """Take what one more token adds; return the text that may be shown.

        ``text``: what is certain now, ``waiting``: what would stand behind it if the answer ended here,
        ``special``: how the token is spelled, if it is a special one.
        """
        self._held += text
        shown = self._held + waiting
        end = self._given + len(shown)
        if special is not None:
            self._note(Special(end, special, self._num_specials))
            self._num_specials += 1
        self._unknown.append(self._num_specials)
        if is_certain := NO_TEXT not in waiting:
            self._know(end)
        found = [*self._in_text(shown)] if is_certain else []
        if is_certain or special is not None:
            found += self._in_spelled(shown)
        if found:
            self._know(end)
            self._stop = min(found)
            return shown[: self._stop.characters - self._given]
        return self._show(len(self._held) - self._doubtful())

    def end(self) -> str:
        """Return what is held back: nothing more will come."""
        return self._show(len(self._held))

    def num_kept_tokens(self) -> int:
        """Return how many tokens lie wholly before the stop string; all of them without one."""
        stop = self._stop
        if stop is None:
            return len(self._ends) + len(self._unknown)
        return sum(end.characters <= stop.characters and end.specials <= stop.specials for end in self._ends)

    def _know(self, end: int) -> None:
        """Note where the tokens end of which it was not known."""
        self._ends += [Place(end, specials) for specials in self._unknown]
        self._unknown.clear()

    def _show(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._given += count
        self._specials = [special for special in self._specials if special.place >= self._given]
        return text

    def _note(self, special: Special) -> None:
        """Add a special token. In a row they take no room in the text: their number is bounded here."""
        self._specials.append(special)
        row = [i for i, other in enumerate(self._specials) if other.place == special.place]
        if len(row) > 2 * self._longest + 1:
            middle = row[self._longest]
            self._specials[middle : middle + 2] = [self._specials[middle]._replace(name=GAP)]

    def _num_before(self, special: Special | None) -> int:
        return self._num_specials if special is None else special.number

    def _in_text(self, shown: str) -> Iterator[Place]:
        for stop in self._stops:
            if (at := shown.find(stop)) >= 0:
                characters = self._given + at
                behind = next((special for special in self._specials if special.place > characters), None)
                yield Place(characters, self._num_before(behind))

    def _in_spelled(self, shown: str) -> Iterator[Place]:
        if not (self._spelled and self._specials):
            return
        spelled = Spelled(shown, self._given, self._specials)
        for stop in self._spelled:
            at = spelled.text.find(stop)
            while at >= 0:
                if spelled.is_whole(at) and spelled.is_whole(at + len(stop)):
                    characters, behind = spelled.place(at)
                    yield Place(self._given + characters, self._num_before(behind))
                    break
                at = spelled.text.find(stop, at + 1)

    def _doubtful(self) -> int:
        """Return how many of the last characters that are held may begin a stop string."""
        for count in range(min(self._longest - 1, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self._stops):
                return max(count, self._doubtful_spelled())
        return self._doubtful_spelled()

    def _doubtful_spelled(self) -> int:
        if not (self._spelled and self._specials):
            return 0
        end = self._given + len(self._held)
        spelled = Spelled(self._held, self._given, [s for s in self._specials if s.place <= end])
        for at in range(max(len(spelled.text) - self._longest + 1, 0), len(spelled.text)):
            if spelled.is_whole(at) and any(s.startswith(spelled.text[at:]) for s in self._spelled):
                return len(self._held) - spelled.place(at)[0]
        return 0


class Spelled:
    """A text that begins at ``given``, with the special tokens that stand in it."""

    def __init__(self, text: str, given: int, specials: Sequence[Special]) -> None:
        parts: list[str] = []
        self._spans: list[tuple[int, int, Special]] = []
        past = length = 0
        for special in specials:
            place = special.place - given
            parts += (text[past:place], special.name)
            start = length + len(parts[-2])
            past, length = place, start + len(special.name)
            self._spans.append((start, length, special))
        self.text = "".join([*parts, text[past:]])

    def is_whole(self, at: int) -> bool:
        """Whether no special token is cut there."""
        return not any(start < at < stop for start, stop, _ in self._spans)

    def place(self, at: int) -> tuple[int, Special | None]:
        """Return how many characters of the text lie before, and the first special token behind."""
        before = sum(stop - start for start, stop, _ in self._spans if stop <= at)
        return at - before, next((special for _, stop, special in self._spans if stop > at), None)


def _spellings(stops: Sequence[str], specials: Collection[str]) -> Iterator[str]:
    """Return the stops that special tokens are part of, with and without a space before those."""
    for stop in stops:
        joined = stop
        for name in specials:
            joined = joined.replace(f" {name}", name)
        if joined != stop or any(name in stop for name in specials):
            yield from (stop, joined)
