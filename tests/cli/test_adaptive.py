"""The learned order on workloads made to defeat it, and on one made for it: never far below recency."""

from __future__ import annotations

import random
from array import array
from typing import TYPE_CHECKING

import pytest

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


@pytest.mark.parametrize("workload", [scan, loop, change, flood, drift])
@pytest.mark.parametrize("blocks", [64, 512, 2048])
def test_it_is_within_a_point_of_recency(workload: object, blocks: int) -> None:
    assert callable(workload)
    trace = flat(workload(random.Random(5)))
    assert hit_ratio(trace, "adaptive", blocks) >= hit_ratio(trace, "lru", blocks) - 1


def test_where_frequency_tells_it_is_well_ahead() -> None:
    trace = flat(flood(random.Random(5)))
    assert hit_ratio(trace, "adaptive", 512) > hit_ratio(trace, "lru", 512) + 2


def test_it_is_the_same_in_every_run_of_a_seed() -> None:
    trace = flat(popular(random.Random(5), 20_000))
    once, again = (hit_ratio(trace, "adaptive", 256, seed=3) for _ in range(2))
    assert once == again


def test_who_rules_is_said_with_the_figures_that_decided() -> None:
    trace = flat(flood(random.Random(5)))
    replay = Replay(trace, 512, policy="adaptive")
    assert replay.rule()["ruling"] == "lru"
    replay.advance(len(trace))
    rule = replay.rule()
    assert rule["ruling"] == "survival"
    assert rule["shadow_hit_rate_survival"] > rule["shadow_hit_rate_lru"] > 0
    assert rule["lessons"] > 10
    assert rule["rule_changes"] % 2 == 1
    assert Replay(trace, 512).rule() == {"ruling": "lru"}
