"""What a request says of the time after its answer, as the pool takes it. Knows no text and no engine."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kvhybrid._core import Sequence
    from kvhybrid.engine.request import Request

__all__ = ["Expectation", "said_at_end"]

# Of the gaps between the turns of recorded coding agents nine in ten are below 100 s.
TOOL_RESULT_S: Final = 120.0


class Expectation(StrEnum):
    """What is expected to come behind an answer."""

    TOOL_RESULT = "tool_result"
    """A tool was called, and its result comes back in seconds: the text leaves last of its priority for two
    minutes, and is as any other then."""
    USER = "user"
    """Somebody may answer, or not: what was learned, or recency, says how long that is worth waiting for."""
    NOTHING = "nothing"
    """Nobody goes on from here: what is nobody else's is the first to leave."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a text is retained as."""

    priority: int
    ttl_s: float | None
    lapses: bool = False

    def of(self, sequence: Sequence, *, start: int) -> None:
        """Say it of a sequence that is about to be closed, whose own text begins at ``start``."""
        sequence.retain(self.priority, self.ttl_s, lapses=self.lapses, start=start)


def said_at_end(request: Request) -> Said | None:
    """Return as what the request's text is retained behind its answer; None: as any other."""
    retention = request.retention
    if request.expects is Expectation.NOTHING:
        return Said(0, 0.0)
    if request.expects is Expectation.TOOL_RESULT and (retention is None or retention.ttl_s is None):
        return Said(retention.priority if retention else 0, TOOL_RESULT_S, lapses=True)
    return Said(retention.priority, retention.ttl_s) if retention else None
