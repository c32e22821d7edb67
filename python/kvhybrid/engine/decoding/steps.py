"""``Steps``: a decoder taken a token at a time, and what its steps have in common. Knows no decoder."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Plain", "Step", "Steps"]


class Step(Protocol):
    """One step; ``part`` is a token or, behind the step that joins them, a piece of text."""

    def push(self, part: str) -> Iterable[str]:
        """Take one part, and return the parts that it completes."""

    def end(self) -> Iterable[str]:
        """Return what was held back: nothing more will come."""

    @property
    def holds(self) -> bool:
        """Whether ``end`` would return anything."""


class Steps:
    """All steps of one answer, in their order."""

    def __init__(self, steps: Sequence[Step] = ()) -> None:
        self._steps = steps

    def push(self, token: str) -> str:
        """Take one more token, and return the text that it adds and no later token can change."""
        return "".join(self._through(0, [token]))

    def end(self) -> str:
        """Return the text that was held back. Nothing may be pushed behind it."""
        found: list[str] = []
        for i, step in enumerate(self._steps):
            found += self._through(i + 1, step.end())
        return "".join(found)

    def peek(self) -> str:
        """Return the text that ``end`` would return, and change nothing."""
        if not any(step.holds for step in self._steps):
            return ""
        return self.copy().end()

    def copy(self) -> Steps:
        """Return the same, to go on from here independently."""
        return Steps([copy.copy(step) for step in self._steps])

    def behind(self, others: Sequence[Step]) -> Steps:
        """Return these steps with ``others`` behind them."""
        return Steps([*self._steps, *others])

    def _through(self, first: int, parts: Iterable[str]) -> Iterable[str]:
        for step in self._steps[first:]:
            parts = [found for part in parts for found in step.push(part)]
        return parts


class Plain:
    """A step that holds nothing back."""

    holds = False

    def end(self) -> Iterable[str]:
        return ()
