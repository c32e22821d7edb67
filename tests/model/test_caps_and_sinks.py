"""Models whose scores have a soft cap or sinks: on the paged route, with their own texts to the token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from families import EAGER_CONFIGS, make_model, prompt
from transformers import DynamicCache, Gemma2ForCausalLM

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.model.page_kernel import NativeAttention
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from transformers import PreTrainedModel

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:transformers")

GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
CONFIG: dict[str, Any] = {"max_tokens": 4096, "block_size": 8}


@pytest.fixture(scope="module", params=list(EAGER_CONFIGS))
def models(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model twice: one to be attached, one that is left alone."""
    found = []
    for _ in range(2):
        model = make_model(request.param)
        torch.manual_seed(1)
        for name, weight in model.named_parameters():
            if "sinks" in name:
                weight.data.normal_(std=2.0)  # as large as scores are
        found.append(model)
    return found[0], found[1]


def generate(model: PreTrainedModel, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    options = {"attention_mask": torch.ones_like(ids), **GREEDY, **options}
    text: torch.Tensor = model.generate(ids, **options)
    return text


def test_caps_and_sinks_matter_in_these_models(models) -> None:
    model, own = models
    ids = prompt(41)
    expected = own(ids).logits
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping, before = None, module.attn_logit_softcapping
        elif hasattr(module, "sinks"):
            before = module.sinks.data
            module.sinks.data = torch.full_like(before, -1e9)
        else:
            continue
        assert (model(ids).logits - expected).abs().max() > 0.05 * expected.std()
        if hasattr(module, "sinks"):
            module.sinks.data = before
        else:
            module.attn_logit_softcapping = before
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("kernel", [True, False], ids=["native", "torch"])
def test_texts_are_the_models_own(models, kernel: bool, monkeypatch) -> None:
    model, own = models
    if not kernel:  # as on a device without a kernel: mirrors, then pages in torch
        monkeypatch.setattr(NativeAttention, "serves", staticmethod(lambda storage: False))
        monkeypatch.setattr("kvhybrid.model.routes.SHORT", 40)
    ids = prompt(37)
    longer = torch.cat([ids, prompt(50, seed=3)], dim=1)
    with kvhybrid.attach(model, config=KVCacheConfig(**CONFIG)) as attachment:
        assert attachment.route is Route.PAGED
        for text in (ids, ids, longer, longer[:, :43], prompt(1, seed=5)):
            assert torch.equal(generate(model, text), generate(own, text))
        assert attachment.cache.get_stats()["cached_tokens"] >= 36 + 37 + 42
    assert model.config._attn_implementation == "eager"


def test_a_left_padded_batch_and_beams(models) -> None:
    model, own = models
    ids = torch.cat([prompt(35, seed=1), prompt(35, seed=2), prompt(35, seed=3)])
    mask = torch.ones_like(ids)
    ids[1, :29], mask[1, :29] = 0, 0
    ids[2, :3], mask[2, :3] = 0, 0
    for options in ({}, {"num_beams": 3}):
        expected = generate(own, ids, attention_mask=mask, **options)
        with kvhybrid.attach(model, config=KVCacheConfig(**CONFIG)):
            for _ in range(2):
                assert torch.equal(generate(model, ids, attention_mask=mask, **options), expected)


def test_steps_of_any_width_give_the_models_own_logits(models) -> None:
    model, own = models
    ids, past, done = prompt(96, seed=7), DynamicCache(config=own.config), 0
    with (
        torch.no_grad(),
        kvhybrid.attach(model, config=KVCacheConfig(**CONFIG)) as attachment,
    ):
        session = attachment.cache.session("steps")
        for width in (1, 3, 30, 1, 16, 17, 1, 27):
            fed = ids[:, done : done + width]
            found = model(input_ids=fed, **over(session), use_cache=True).logits
            expected = own(input_ids=fed, **over(past), use_cache=True).logits
            assert (found - expected).abs().max() < 1e-4 * expected.std()
            done += width
    assert done == ids.shape[1]


def test_without_the_cache_an_attached_model_attends_as_before(models) -> None:
    model, own = models
    ids = prompt(33)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with kvhybrid.attach(model, config=KVCacheConfig(**CONFIG)):
        assert torch.equal(model(ids, attention_mask=mask).logits, own(ids, attention_mask=mask).logits)
        foreign = DynamicCache(config=own.config)
        assert torch.equal(generate(model, ids, **over(foreign)), generate(own, ids))
        options = {"output_attentions": True, "return_dict_in_generate": True}
        with pytest.warns(UserWarning, match="output_attentions"):
            found = model.generate(ids, attention_mask=mask, **options, **GREEDY)
    expected = own.generate(ids, attention_mask=mask, **options, **GREEDY)
    assert torch.equal(found.sequences, expected.sequences)
    for ours, theirs in zip(found.attentions, expected.attentions, strict=True):
        assert all(map(torch.equal, ours, theirs))


def test_they_are_bit_equal_with_reproducible(models, monkeypatch) -> None:
    monkeypatch.setattr("kvhybrid.model.attach.GRID", 16)
    model, _ = models
    ids = prompt(90, seed=9)
    with kvhybrid.attach(model, config=KVCacheConfig(**CONFIG, reproducible=True)) as attachment:
        first, second = (
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                output_logits=True,
                return_dict_in_generate=True,
                **GREEDY,
            )
            for _ in range(2)
        )
        assert attachment.cache.get_stats()["cached_tokens"] > 0
    assert all(map(torch.equal, first.logits, second.logits))


@pytest.mark.skipif(not Gemma2ForCausalLM._supports_sdpa, reason="here it does not run on torch's attention")
def test_on_torchs_attention_a_cap_is_left_out_as_the_model_itself_does() -> None:
    model, own = make_model("gemma2"), make_model("gemma2")
    for each in (model, own):
        each.set_attn_implementation("sdpa")
    ids = prompt(37)
    with kvhybrid.attach(model, config=KVCacheConfig(**CONFIG)) as attachment:
        assert attachment.route is Route.PAGED
        for _ in range(2):
            assert torch.equal(generate(model, ids), generate(own, ids))


def test_quantized_pages_are_attended_to_with_caps_and_sinks(models) -> None:
    model, own = models
    config = KVCacheConfig(max_tokens=320, block_size=16, use_quantization=True, quantization_bits=8)
    ids = prompt(77, seed=4)
    with kvhybrid.attach(model, config=config) as attachment:
        for seed in range(4, 7):  # the first text's pages grow cold
            generate(model, prompt(77, seed=seed))
        assert attachment.cache.get_stats()["quantized_tokens"] > 0
        before = attachment.cache.get_stats()["cached_tokens"]
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert attachment.cache.get_stats()["cached_tokens"] > before
    expected = own(ids).logits[0, -1]
    assert (output.logits[0][0] - expected).abs().max() < 0.1 * expected.std()
