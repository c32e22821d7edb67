"""Flat workloads made to defeat a policy that learns, and the table of what it makes of them.

``python tests/workloads.py`` prints the table of ``docs/eviction.md``.
"""

from __future__ import annotations

import random
import sys
from array import array
from typing import TYPE_CHECKING

from kvhybrid._core import Replay, Trace

if TYPE_CHECKING:
    from collections.abc import Iterable

KEYS = 60_000


def flat(keys: Iterable[int]) -> Trace:
    trace = Trace(1)
    requests, runs = array("q"), array("q")
    for when, key in enumerate(keys):
        requests.extend((when, 1, 0, 2))
        runs.extend((key, 1))
    trace.extend(requests, runs)
    return trace


def hit_ratio(trace: Trace, policy: str, blocks: int, seed: int = 0) -> float:
    replay = Replay(trace, blocks, policy=policy, seed=seed)
    replay.advance(len(trace))
    return 100 * replay.hits / replay.references


def popular(rng: random.Random, count: int, *, first: int = 0, among: int = 4000) -> list[int]:
    return [first + int(among * rng.random() ** 3) for _ in range(count)]


def scan(rng: random.Random) -> list[int]:
    """Popular keys, and every so often a run over keys that never come back."""
    keys, cold = [], 1_000_000
    while len(keys) < KEYS:
        keys += popular(rng, 3000)
        keys += range(cold, cold + 2000)
        cold += 2000
    return keys


def loop(rng: random.Random) -> list[int]:
    return [i % 513 for i in range(KEYS)]


def change(rng: random.Random) -> list[int]:
    """All at once other keys are popular, six times."""
    return [key for era in range(6) for key in popular(rng, KEYS // 6, first=10_000 * era)]


def flood(rng: random.Random) -> list[int]:
    """One tenant asks for keys that it never asks for again, three times as often as all others ask."""
    others = iter(popular(rng, KEYS))
    return [next(others) if i % 4 == 0 else 1_000_000 + i for i in range(KEYS)]


def drift(rng: random.Random) -> list[int]:
    """What is wanted moves on steadily: recency is as good as it gets."""
    return [i // 16 + int(200 * rng.random() ** 2) for i in range(KEYS)]


WORKLOADS = {
    "scan": (scan, "popular keys, and runs over keys that never come back"),
    "loop": (loop, "513 keys in turn, one more than fit into 512"),
    "change": (change, "other keys are popular, all at once, six times"),
    "flood": (flood, "one tenant asks three times as often as all others, never twice for the same"),
    "drift": (drift, "what is wanted moves on steadily"),
}
SIZES = (64, 512, 2048)


def table() -> str:
    rows = ["| workload | blocks | lru | adaptive | survival (no guard) |", "|---|---|---|---|---|"]
    for name, (make, told) in WORKLOADS.items():
        trace = flat(make(random.Random(5)))
        for blocks in SIZES:
            ratios = [hit_ratio(trace, policy, blocks) for policy in ("lru", "adaptive", "survival")]
            cells = " | ".join(f"{ratio:.1f}" for ratio in ratios)
            rows.append(f"| {name}: {told} | {blocks:,} | {cells} |")
    return "\n".join([*rows, ""])


if __name__ == "__main__":
    sys.stdout.write(table())
