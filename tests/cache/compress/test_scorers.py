"""Scorers against their formulas written out in float64, one token at a time, and what is always kept."""

from __future__ import annotations

import math

import pytest
import torch

from kvhybrid.cache.compress.scorers import LAG, NEED_QUERIES, SCORERS, Queries
from kvhybrid.cache.compress.selection import RECENT, SINKS, choose, gather, kept_tokens
from kvhybrid.presets import CompressionScorer

ROWS, HEADS, GROUP, WIDTH, VALUE_WIDTH = 2, 3, 2, 16, 12


def states(tokens: int, window: int = RECENT) -> tuple[torch.Tensor, torch.Tensor, Queries]:
    keys = torch.randn(ROWS, HEADS, tokens, WIDTH)
    values = torch.randn(ROWS, HEADS, tokens, VALUE_WIDTH)
    return keys, values, Queries(torch.randn(ROWS, HEADS * GROUP, window, WIDTH), WIDTH**-0.5)


def paid(keys: torch.Tensor, queries: Queries, row: int, head: int, position: int, key: int) -> float:
    """The attention of one query, at ``position``, to one key, written out."""
    tokens, window = keys.shape[2], queries.states.shape[2]
    query = queries.states[row, head, position - (tokens - window)].double()
    held = keys[row, head // GROUP].double()
    products = [float(query @ held[j]) * queries.scale for j in range(position + 1)]
    return math.exp(products[key]) / sum(math.exp(p) for p in products)


def test_streaming_prefers_the_last() -> None:
    keys, values, queries = states(50)
    scores = SCORERS[CompressionScorer.STREAMING](keys, values, queries)
    assert scores.shape == (ROWS, HEADS, 50)
    assert (scores[..., 1:] > scores[..., :-1]).all()


def test_knorm_prefers_short_keys() -> None:
    keys, values, queries = states(50)
    scores = SCORERS[CompressionScorer.KNORM](keys, values, queries)
    expected = -math.sqrt(sum(float(x) ** 2 for x in keys[1, 2, 7].double()))
    assert float(scores[1, 2, 7]) == pytest.approx(expected, rel=1e-6)


def test_keydiff_prefers_keys_unlike_the_mean_direction() -> None:
    keys, values, queries = states(50)
    scores = SCORERS[CompressionScorer.KEYDIFF](keys, values, queries)
    held = keys[1, 2].double()
    anchor = (held / held.norm(dim=-1, keepdim=True)).mean(dim=0)
    cosine = held[7] @ anchor / (held[7].norm() * anchor.norm())
    assert float(scores[1, 2, 7]) == pytest.approx(-float(cosine), rel=1e-5)


def test_lagkv_ranks_tokens_of_a_partition_by_their_spread_in_the_range_of_the_next() -> None:
    tokens = SINKS + 3 * LAG + 17
    keys, values, queries = states(tokens)
    scores = SCORERS[CompressionScorer.LAGKV](keys, values, queries)
    for partition in range(2):
        first = SINKS + partition * LAG
        shares = []
        for held in (keys[1, 2].double(), values[1, 2].double()):
            later = held[first + LAG : first + 2 * LAG]
            low, high = later.min(dim=0).values, later.max(dim=0).values
            spread = torch.stack([((held[first + i] - low) / (high - low)).std() for i in range(LAG)])
            shares.append(spread.softmax(dim=0))
        mean = (shares[0] + shares[1]) / 2
        ranks = [float((mean < one).sum()) / LAG for one in mean]
        assert scores[1, 2, first : first + LAG].tolist() == ranks
    assert (scores[..., :SINKS] == 1).all()
    assert (scores[..., SINKS + 2 * LAG :] == 1).all()


def test_lagkv_goes_by_recency_where_there_are_no_two_partitions() -> None:
    keys, values, queries = states(SINKS + 2 * LAG - 1)
    scores = SCORERS[CompressionScorer.LAGKV](keys, values, queries)
    behind = scores[..., SINKS:]
    assert (behind[..., 1:] > behind[..., :-1]).all()


def test_lagkv_survives_a_channel_that_never_changes() -> None:
    keys, values, queries = states(SINKS + 2 * LAG)
    keys[..., 3] = 1.0
    values[..., 0] = 0.0
    assert not SCORERS[CompressionScorer.LAGKV](keys, values, queries).isnan().any()


@pytest.mark.parametrize("window", [RECENT, 5, 1])
def test_snapkv_pools_the_mean_attention_of_the_last_tokens(window: int) -> None:
    keys, values, queries = states(45, window)
    scores = SCORERS[CompressionScorer.SNAPKV](keys, values, queries)
    before = 45 - window
    means = []
    for head in (4, 5):  # the group of KV head 2
        each = [
            sum(paid(keys, queries, 1, head, p, key) for p in range(before, 45)) / window
            for key in range(before)
        ]
        # torch's pooling counts the padding it adds at both ends.
        padded = [0.0, 0.0, *each, 0.0, 0.0]
        means.append([sum(padded[i : i + 5]) / 5 for i in range(before)])
    expected = [(a + b) / 2 for a, b in zip(*means, strict=True)]
    torch.testing.assert_close(scores[1, 2, :before], torch.tensor(expected), atol=1e-6, rtol=1e-4)
    assert (scores[..., before:] > scores[..., :before].max()).all()


def test_tova_is_the_last_tokens_attention_over_all_heads() -> None:
    keys, values, queries = states(45)
    scores = SCORERS[CompressionScorer.TOVA](keys, values, queries)
    expected = [
        sum(paid(keys, queries, 1, head, 44, key) for head in range(HEADS * GROUP)) / (HEADS * GROUP)
        for key in range(44)
    ]
    torch.testing.assert_close(scores[1, 0, :44], torch.tensor(expected), atol=1e-6, rtol=1e-4)
    assert torch.equal(scores[:, 0], scores[:, 1])
    assert (scores[..., 44] > scores[..., :44].max()).all()


def test_there_is_a_scorer_for_every_name() -> None:
    assert set(SCORERS) == set(CompressionScorer)
    assert set(SCORERS) > NEED_QUERIES


@pytest.mark.parametrize(
    ("tokens", "kept", "expected"),
    [
        (0, 0.5, 0),
        (1, 0.5, 1),
        (32, 0.1, 32),
        (33, 0.1, 33),  # what is old is among the first four
        (36, 0.1, 36),
        (37, 0.1, 36),
        (132, 0.25, 57),
        (132, 0.295, 61),  # int, not round
        (132, 1.0, 132),
        (800, 0.125, 128),
        (132, 1 - 0.7, 62),  # removed=0.7, as kvpress adds it up
    ],
)
def test_how_many_tokens_stay(tokens: int, kept: float, expected: int) -> None:
    assert kept_tokens(tokens, kept) == expected


@pytest.mark.parametrize("tokens", [37, 64, 101])
def test_the_first_and_last_tokens_stay_and_each_head_chooses_the_rest(tokens: int) -> None:
    scores = torch.randn(ROWS, HEADS, tokens)
    scores[..., :SINKS] = -9
    scores[..., -RECENT:] = -9
    count = kept_tokens(tokens, 0.5)
    places = choose(scores, count)
    assert places.shape == (ROWS, HEADS, count)
    assert (places[..., 1:] > places[..., :-1]).all()
    ends = torch.tensor([*range(SINKS), *range(tokens - RECENT, tokens)])
    for row in range(ROWS):
        for head in range(HEADS):
            own = places[row, head]
            assert torch.isin(ends, own).all()
            between = scores[row, head, SINKS:-RECENT]
            best = between.topk(count - len(ends)).values if count > len(ends) else between[:0]
            found = scores[row, head, own[SINKS : count - RECENT]]
            assert torch.equal(found.sort().values, best.sort().values)


def test_no_score_however_wild_pushes_out_what_always_stays() -> None:
    scores = torch.full((1, 1, 60), math.nan)
    scores[..., 10:20] = math.inf
    places = choose(scores, 40)
    assert places[0, 0].tolist() == [0, 1, 2, 3, *places[0, 0, 4:8].tolist(), *range(28, 60)]
    assert all(10 <= place < 20 for place in places[0, 0, 4:8].tolist())


def test_tokens_are_gathered_head_by_head() -> None:
    keys, _, _ = states(50)
    places = choose(torch.randn(ROWS, HEADS, 50), 40)
    kept = gather(keys, places)
    for row in range(ROWS):
        for head in range(HEADS):
            assert torch.equal(kept[row, head], keys[row, head, places[row, head]])
