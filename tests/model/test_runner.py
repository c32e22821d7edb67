"""The runner against the models themselves: rows packed or one by one, in steps of any shape."""

import random

import numpy as np
import pytest
import torch
from families import CONFIGS, make_model, prompt
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from kvhybrid import KVCache, KVCacheConfig, UnsupportedError
from kvhybrid._core import Batch
from kvhybrid.cache.step import Step
from kvhybrid.model.packing import choose_packing
from kvhybrid.model.runner import Packing, Runner
from kvhybrid.model.versions import CACHE


def make_cache(model, block_size=8, max_tokens=1024, **options):
    return KVCache.for_model(model, KVCacheConfig(max_tokens=max_tokens, block_size=block_size, **options))


def own_logits(model, ids, positions):
    with torch.no_grad():
        return model(input_ids=ids).logits[0, positions].float()


@pytest.mark.parametrize("packing", list(Packing))
@pytest.mark.parametrize("family", list(CONFIGS))
def test_steps_of_any_shape_give_the_models_own_logits(family, packing):
    model = make_model(family)
    draw = random.Random(family)
    texts = [prompt(n, seed=n)[0] for n in (37, 5, 64, 23)]
    shares = []
    for text in texts:
        left, cuts = len(text), []
        while left:
            cuts.append(min(left, draw.choice([1, 1, 2, 5, 9, 17])))
            left -= cuts[-1]
        shares.append(cuts)
    expected = [own_logits(model, text[None], slice(None)) for text in texts]
    cache = make_cache(model)
    runner = Runner(model, cache.storage, packing)
    rows = [cache.pool.open(text.numpy()) for text in texts]
    batch, done = Batch(cache.pool, rows), [0] * len(texts)
    while any(shares):
        counts = np.array([cuts[0] if cuts and draw.random() < 0.8 else 0 for cuts in shares], np.int32)
        active = [row for row, count in enumerate(counts) if count]
        if not active:
            continue
        step = Step.plan(cache.storage, batch, counts)
        new = torch.cat([texts[row][done[row] : done[row] + counts[row]] for row in active])
        found = runner.run(step, new, active)
        step.commit()
        for row, logits in zip(active, found, strict=True):
            done[row] += shares[row].pop(0)
            torch.testing.assert_close(logits, expected[row][done[row] - 1], atol=2e-3, rtol=1e-3)
    runner.close()
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("packing", list(Packing))
def test_a_cached_prefix_is_read_and_not_computed(packing):
    model = make_model("llama")
    cache = make_cache(model)
    runner = Runner(model, cache.storage, packing)
    first, second = prompt(40)[0], torch.cat([prompt(29)[0], prompt(7, seed=3)[0]])
    for key, (text, cached) in enumerate(((first, 0), (second, 29), (first, 39))):
        row = cache.pool.open(text.numpy())
        assert row.cached == cached
        step = Step.plan(cache.storage, Batch(cache.pool, [row]))
        found = runner.run(step, text[cached:], [key])
        step.commit()
        runner.forget(key)
        row.close()
        torch.testing.assert_close(found[0], own_logits(model, text[None], -1), atol=2e-3, rtol=1e-3)
    runner.close()


@pytest.mark.parametrize("family", list(CONFIGS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_families_are_packed(family, dtype):
    model = make_model(family, dtype=dtype)
    packing, reason = choose_packing(model, make_cache(model).layout)
    assert (packing, reason) == (Packing.RAGGED, "packed rows give the model's own logits")
    assert model.config._attn_implementation == "sdpa"
    assert not model.training


def test_other_attention_goes_row_by_row():
    model = make_model("llama")
    model.set_attn_implementation("eager")
    packing, reason = choose_packing(model, make_cache(model).layout)
    assert packing is Packing.ROWWISE
    assert "'eager'" in reason


def test_a_model_that_counts_its_own_positions_goes_row_by_row():
    model = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=48, n_layer=2, n_head=6)).eval()
    assert choose_packing(model, make_cache(model).layout)[0] is Packing.ROWWISE


def test_a_model_that_ignores_the_cache_is_refused_with_both_reasons(monkeypatch):
    model = make_model("llama")
    forward = model.forward
    calls = []

    def forgetful(*args, **kwargs):
        calls.append(type(kwargs.get(CACHE)).__name__)
        output = forward(*args, **kwargs)
        if calls[-1] == "StepCache":
            output.logits = output.logits * 2 + 1
        return output

    monkeypatch.setattr(model, "forward", forgetful)
    with pytest.raises(UnsupportedError, match=r"ragged: logits differ by .*; rowwise: logits differ by"):
        choose_packing(model, make_cache(model).layout)
    assert model.config._attn_implementation == "sdpa"


def test_models_without_plain_attention_are_refused():
    state = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    both = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=4, num_layers=1, num_heads=4))
    layout = make_cache(make_model("llama")).layout
    for model, reason in ((state, "recurrent state"), (both, "encoder-decoder")):
        with pytest.raises(UnsupportedError, match=reason):
            choose_packing(model, layout)
