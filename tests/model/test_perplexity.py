"""What a change to cached K and V costs: nothing for none, more the coarser, all of it behind the prefix."""

from __future__ import annotations

import math

import pytest
import torch
from families import VOCAB, make_model

from kvhybrid.errors import InvalidRequestError, UnsupportedError
from kvhybrid.model.perplexity import Compressed, Quantized, can_be_shortened, judge, measure_quality
from kvhybrid.presets import CompressionScorer


def text(length):
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(1))


def by_hand(model, ids, prefix, scored):
    """Mean nats of the scored tokens, windows computed whole and without a cache."""
    nats = []
    for start in range(0, len(ids) - prefix - scored, scored):
        window = ids[start : start + prefix + scored + 1]
        with torch.inference_mode():
            logits = model(window[None], use_cache=False).logits[0, prefix:-1]
        nats.append(torch.nn.functional.cross_entropy(logits, window[prefix + 1 :], reduction="none"))
    return torch.cat(nats).mean().item()


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gpt2"])
def test_full_precision_is_what_the_model_says_without_a_cache(family):
    model, ids = make_model(family), text(150)
    found = measure_quality(model, ids, {"same": lambda key, value: (key, value)}, prefix=48, scored=20)
    assert found["full precision"].perplexity == pytest.approx(
        math.exp(by_hand(model, ids, 48, 20)), rel=1e-5
    )
    assert found["same"].change == 0
    assert found["same"].divergence == 0


def test_the_error_of_a_change_is_that_of_the_mean_of_its_windows():
    """Of changes that cost the windows alike there is none, whatever the windows themselves cost."""
    reference = torch.tensor([3.0, 5.0, 4.0], dtype=torch.float64)
    even = judge(reference + 0.125, reference, divergence=0.0, refused_pages=0)
    assert even.change == pytest.approx(math.expm1(0.125))
    assert even.error == 0
    worse = torch.tensor([0.0, 0.3, 0.0], dtype=torch.float64)
    uneven = judge(reference + worse, reference, divergence=0.0, refused_pages=0)
    assert uneven.change == pytest.approx(math.expm1(0.1))
    assert uneven.error == pytest.approx(math.exp(0.1) * 0.1)  # deviation sqrt(0.03), three windows
    assert math.isnan(judge(reference[:1], reference[:1], divergence=0.0, refused_pages=0).error)


def test_fewer_bits_cost_more_and_losing_the_prefix_costs_most():
    model, ids = make_model("llama"), text(200)
    changes = {
        "int8": Quantized(8, block_size=16),
        "int4": Quantized(4, block_size=16),
        "none": lambda key, value: (torch.zeros_like(key), torch.zeros_like(value)),
    }
    found = measure_quality(model, ids, changes, prefix=64, scored=32)
    assert 0 < found["int8"].divergence < found["int4"].divergence / 20 < found["none"].divergence / 40
    assert abs(found["int8"].change) < 1e-3
    assert found["int4"].refused_pages == 0


def test_what_fills_no_page_stays_as_it_is_and_so_does_what_is_refused():
    change = Quantized(4, block_size=16)
    key, value = torch.randn(2, 2, 3, 40, 8)
    new_key, new_value = change(key, value)
    assert new_key.shape == key.shape
    assert torch.equal(new_key[:, :, 32:], key[:, :, 32:])
    assert not torch.equal(new_key[:, :, :32], key[:, :, :32])
    assert change.refused_pages == 0
    value[1, 0, 3, 0] = math.inf
    _, new_value = change(key, value)
    assert torch.equal(new_value[1, :, :16], value[1, :, :16])
    assert not torch.equal(new_value[1, :, 16:32], value[1, :, 16:32])
    assert change.refused_pages == 1


def test_a_text_without_a_whole_window_is_refused():
    with pytest.raises(InvalidRequestError, match="68 tokens, and a window takes 69"):
        measure_quality(make_model("llama"), text(68), {}, prefix=48, scored=20)


def test_what_is_kept_stays_at_its_positions():
    """Keeping everything changes nothing, whatever the scorer; keeping less changes something."""
    model, ids = make_model("llama"), text(200)
    changes = {
        f"{scorer} {kept}": Compressed(scorer, kept)
        for scorer in (CompressionScorer.STREAMING, CompressionScorer.KNORM)
        for kept in (1.0, 0.25)
    }
    found = measure_quality(model, ids, changes, prefix=64, scored=32)
    assert abs(found["streaming 1.0"].divergence) < 1e-6
    assert abs(found["knorm 1.0"].divergence) < 1e-6
    assert found["streaming 0.25"].divergence > 1e-3
    assert found["knorm 0.25"].divergence > 1e-3


def test_a_shortened_prefix_is_what_masking_the_lost_tokens_makes_of_it():
    model, ids = make_model("llama"), text(64 + 16 + 1)
    found = measure_quality(
        model, ids, {"short": Compressed(CompressionScorer.STREAMING, 0.25)}, prefix=64, scored=16
    )
    # 32 old tokens, of which 8 stay: the first 4, always, and the last 4 of them.
    mask = torch.zeros(80, 80).masked_fill(torch.ones(80, 80).triu(1).bool(), -torch.inf)
    mask[64:, 4:28] = -torch.inf
    with torch.inference_mode():
        logits = model(ids[None, :-1], use_cache=False, attention_mask=mask[None, None]).logits[0, 64:]
    nats = torch.nn.functional.cross_entropy(logits, ids[65:]).item()
    assert found["short"].perplexity == pytest.approx(math.exp(nats), rel=1e-4)


def test_models_that_cannot_keep_fewer_tokens_here_are_told_apart():
    assert can_be_shortened(make_model("llama"))
    assert not can_be_shortened(make_model("mistral-window"))
    with pytest.raises(UnsupportedError, match="queries"):
        Compressed(CompressionScorer.TOVA, 0.5)
