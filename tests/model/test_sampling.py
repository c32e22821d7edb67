"""Drawing tokens: by the numbers of one's own request, whoever else is in the batch."""

import pytest
import torch

from kvhybrid.model.sampling import Sampling, sample

SETTINGS = [(0.0, 1.0), (1.0, 1.0), (0.7, 0.9), (1e-6, 1.0), (3.0, 0.2), (1.0, 1e-9), (50.0, 0.999)]


def logits(rows, vocab=50):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(1)) * 3


def test_greedy_takes_the_likeliest():
    rows = logits(5)
    assert sample(rows, [Sampling()] * 5) == rows.argmax(-1).tolist()


def test_a_row_draws_the_same_alone_and_among_others():
    rows = logits(len(SETTINGS))
    alone = []
    for index, (temperature, top_p) in enumerate(SETTINGS):
        setting = Sampling.seeded(temperature, top_p, index)
        alone.append([sample(rows[index : index + 1], [setting])[0] for _ in range(20)])
    settings = [Sampling.seeded(t, p, i) for i, (t, p) in enumerate(SETTINGS)]
    together = [sample(rows, settings) for _ in range(20)]
    assert [list(row) for row in zip(*together, strict=True)] == alone


def test_draws_follow_the_probabilities():
    rows = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]])
    setting = Sampling.seeded(2.0, 1.0, 3)
    found = (
        torch.bincount(torch.tensor([sample(rows, [setting])[0] for _ in range(4000)]), minlength=4) / 4000
    )
    assert torch.allclose(found, torch.softmax(rows[0] / 2.0, -1), atol=0.03)
    assert found[3] == 0


def test_top_p_keeps_the_fewest_that_reach_it():
    rows = torch.log(torch.tensor([[0.1, 0.5, 0.05, 0.35]]))
    for top_p, allowed in (
        (0.4, {1}),
        (0.5001, {1, 3}),
        (0.84, {1, 3}),
        (0.86, {0, 1, 3}),
        (0.99, {0, 1, 2, 3}),
    ):
        setting = Sampling.seeded(1.0, top_p, 0)
        assert {sample(rows, [setting])[0] for _ in range(300)} == allowed


def test_a_seed_repeats_and_none_does_not():
    rows = logits(1, 5000)
    draws = [
        [sample(rows, [s])[0] for _ in range(8)]
        for s in (Sampling.seeded(5.0, 1.0, seed) for seed in (7, 7, None, None))
    ]
    assert draws[0] == draws[1]
    assert draws[2] != draws[3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_likeliest_token_are_none(temperature):
    rows = logits(4)
    rows[1, 3] = torch.nan
    rows[2] = -torch.inf
    found = sample(rows, [Sampling.seeded(temperature, 1.0, 0) for _ in range(4)])
    assert [token is None for token in found] == [False, True, True, False]


def test_the_smallest_temperature_takes_the_likeliest_token():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    tiny = [Sampling.seeded(1e-50, 1.0, 0), Sampling.seeded(1e-50, 0.5, 0)]
    assert sample(logits, tiny) == [1, 0]
