"""Counters and latencies of an engine, in bounded memory; and what its health is said to be."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields
from typing import Any, Final

__all__ = ["Health", "Latencies", "Statistics"]

WINDOW: Final = 1024
PERCENTILES: Final = (50, 95, 99)


class Latencies:
    """The last ``WINDOW`` durations in milliseconds."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def add(self, milliseconds: float) -> None:
        """Count one."""
        self._recent.append(milliseconds)

    def mean(self, default: float) -> float:
        """Return the mean, or ``default`` before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else default

    def percentiles(self, name: str) -> dict[str, float]:
        """Return ``<name>_p50_ms`` and so on, by nearest rank; 0 before the first."""
        ordered = sorted(self._recent)
        found = {}
        for percent in PERCENTILES:
            index = max(-(-len(ordered) * percent // 100) - 1, 0)
            found[f"{name}_p{percent}_ms"] = ordered[index] if ordered else 0.0
        return found


@dataclass(slots=True)
class Statistics:
    """What an engine counts, since it was entered."""

    requests: int = 0
    """Let in at the door."""
    completed: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    """Turned away at the door, for whatever reason."""
    steps: int = 0
    preemptions: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    failed_steps_in_a_row: int = 0
    time_to_first_token: Latencies = field(default_factory=Latencies)
    latency: Latencies = field(default_factory=Latencies)
    step: Latencies = field(default_factory=Latencies)

    def flat(self) -> dict[str, int | float]:
        """Return everything as one flat, JSON-ready mapping."""
        found: dict[str, int | float] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            found.update(value.percentiles(item.name) if isinstance(value, Latencies) else {item.name: value})
        return found


class Health(dict[str, Any]):
    """``status`` and ``checks``, JSON-ready; true exactly when every check passed."""

    @classmethod
    def of(cls, **checks: tuple[bool, str]) -> Health:
        """Return the health that follows from named checks: whether each passed, and what was seen."""
        named = {name: {"healthy": passed, "detail": detail} for name, (passed, detail) in checks.items()}
        passed = all(check["healthy"] for check in named.values())
        return cls(status="healthy" if passed else "unhealthy", checks=named)

    def __bool__(self) -> bool:
        return bool(self["status"] == "healthy")
