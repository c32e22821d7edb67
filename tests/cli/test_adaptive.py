"""The learned order on workloads made to defeat it, and on one made for it: never far below recency."""

from __future__ import annotations

import random

import pytest
from workloads import SIZES, WORKLOADS, flat, flood, hit_ratio, popular

from kvhybrid._core import Replay


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("blocks", SIZES)
def test_it_is_within_a_point_of_recency(workload: str, blocks: int) -> None:
    trace = flat(WORKLOADS[workload][0](random.Random(5)))
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
