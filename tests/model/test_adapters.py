"""What peft does to a model, through the cache: the text is the model's own, or the error says why not."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import pytest
import torch
from families import make_model, prompt

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.errors import UnsupportedError
from kvhybrid.model.versions import over

peft = pytest.importorskip("peft", reason="peft is not installed: it is in the dependency group 'examples'")

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from kvhybrid.model.attach import Attachment

IDS = prompt(40)
CONFIG = KVCacheConfig(max_tokens=2048, block_size=16)
LM = {"task_type": "CAUSAL_LM"}
QV = {**LM, "target_modules": ["q_proj", "v_proj"]}


def lora(**more: Any) -> PeftConfig:
    return peft.LoraConfig(r=4, init_lora_weights=False, **{**QV, **more})


def adapted(config: PeftConfig, *more: str, model: torch.nn.Module | None = None) -> PeftModel:
    """A tiny model with an adapter ``one``, and others of the same kind, each with its own random weights."""
    model = model or make_model("llama")
    torch.manual_seed(1)
    model = peft.get_peft_model(model, config, adapter_name="one")
    for name in more:
        model.add_adapter(name, config)
    return model.eval()


def text(model: PeftModel, ids: torch.Tensor = IDS, **kwargs: Any) -> torch.Tensor:
    mask = torch.ones_like(ids)
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **kwargs)


def cached(attachment: Attachment) -> int:
    return int(attachment.cache.get_stats()["cached_tokens"])


# Every kind that adds no tokens of its own, and what it takes for its weights not to be a no-op.
KINDS = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "lora with trained norms": lora(modules_to_save=["input_layernorm"]),
    "ia3": peft.IA3Config(
        **{**LM, "target_modules": ["k_proj", "v_proj", "down_proj"]},
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
    "loha": peft.LoHaConfig(**QV, init_weights=False),
    "vera": peft.VeraConfig(**{**QV, "target_modules": ["q_proj"]}, r=4, init_weights=False),
    "oft": peft.OFTConfig(**{**QV, "target_modules": ["q_proj"]}, oft_block_size=8, init_weights=False),
}


@pytest.mark.parametrize("config", KINDS.values(), ids=KINDS.keys())
def test_adapters_taking_turns_keep_their_own_pages(config: PeftConfig) -> None:
    model = adapted(config, "two")

    def turn(adapter: str | None) -> torch.Tensor:
        if adapter is not None:
            model.set_adapter(adapter)
        with model.disable_adapter() if adapter is None else nullcontext():
            return text(model)

    turns = ["one", "two", None]
    expected = {adapter: turn(adapter) for adapter in turns}
    assert not torch.equal(expected["one"], expected[None])
    with kvhybrid.attach(model, config=CONFIG) as attachment:
        for adapter in turns:
            assert torch.equal(turn(adapter), expected[adapter])
        assert cached(attachment) == 0
        for adapter in [None, "two", "one", "two"]:
            assert torch.equal(turn(adapter), expected[adapter])
        assert cached(attachment) == 4 * 39


def test_a_merged_adapter_and_another_scale_are_other_weights() -> None:
    model = adapted(lora())

    def scaled(factor: float) -> torch.Tensor:
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                module.set_scale("one", factor)
        return text(model)

    expected = text(model), scaled(3.0)
    assert not torch.equal(*expected)
    scaled(1.0)
    with kvhybrid.attach(model, config=CONFIG) as attachment:
        assert torch.equal(text(model), expected[0])
        assert torch.equal(scaled(3.0), expected[1])
        assert torch.equal(scaled(1.0), expected[0])
        assert cached(attachment) == 39
        model.merge_adapter()
        assert torch.equal(text(model), expected[0])
        assert cached(attachment) == 39
        model.unmerge_adapter()
        assert torch.equal(text(model), expected[0])


@pytest.mark.parametrize("when", ["before", "after"])
def test_adapters_chosen_row_by_row_run_without_the_cache(when: str) -> None:
    model = make_model("llama")
    with nullcontext() if when == "before" else kvhybrid.attach(model, config=CONFIG) as attachment:
        wrapped = adapted(lora(), "two", model=model)
        names = {"adapter_names": ["one", "two", "__base__"]}
        rows = IDS.repeat(3, 1)
        expected = text(adapted(lora(), "two"), rows, **names)
        assert len({tuple(row) for row in expected.tolist()}) == 3
        with kvhybrid.attach(wrapped, config=CONFIG) if when == "before" else nullcontext(attachment) as at:
            with pytest.warns(UserWarning, match="adapters chosen row by row"):
                assert torch.equal(text(wrapped, rows, **names), expected)
            assert torch.equal(text(wrapped, IDS), expected[:1])
            assert torch.equal(text(wrapped, rows, **names), expected)
            assert cached(at) == 0


@pytest.mark.parametrize("way", ["generate", "forward"])
def test_a_session_refuses_adapters_chosen_row_by_row(way: str) -> None:
    model = adapted(lora(), "two")
    rows, names = IDS.repeat(2, 1), {"adapter_names": ["one", "two"]}
    with kvhybrid.attach(model, config=CONFIG) as attachment:
        session = attachment.cache.session("s")
        with pytest.raises(UnsupportedError, match="adapters chosen row by row"):
            if way == "generate":
                text(model, rows, **over(session), **names)
            else:
                model(input_ids=rows, **over(session), **names)
        assert session.num_rows == 0


DROPPING = {
    "lora_dropout": lora(lora_dropout=0.5),
    "module_dropout": peft.LoHaConfig(**QV, init_weights=False, module_dropout=0.5),
    "rank_dropout": peft.LoHaConfig(**QV, init_weights=False, rank_dropout=0.5),
}


@pytest.mark.parametrize("config", DROPPING.values(), ids=DROPPING.keys())
def test_the_dropout_of_a_fresh_adapter_is_never_cached(config: PeftConfig) -> None:
    model = make_model("llama")
    with kvhybrid.attach(model, config=CONFIG) as attachment:
        torch.manual_seed(1)
        wrapped = peft.get_peft_model(model, config, adapter_name="one")
        assert not model.training  # but the adapter inside is, as peft leaves it
        with pytest.warns(UserWarning, match="dropout would be cached"):
            text(wrapped)
        with pytest.raises(UnsupportedError, match="dropout would be cached"):
            wrapped(input_ids=IDS, **over(attachment.cache.session("s")))
        assert attachment.cache.get_stats()["queried_tokens"] == 0
        wrapped.eval()
        assert torch.equal(text(wrapped), text(wrapped))
        assert cached(attachment) == 39


TOKENS_OF_ITS_OWN = {
    "prompt tuning": peft.PromptTuningConfig(**LM, num_virtual_tokens=4),
    "prefix tuning": peft.PrefixTuningConfig(**LM, num_virtual_tokens=4),
    "p-tuning": peft.PromptEncoderConfig(**LM, num_virtual_tokens=4, encoder_hidden_size=16),
}


# peft says so of every prompt that transformers numbers, attached or not.
@pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")
# peft 0.21 gives its prefix the name that caches had before transformers 5.24, attached or not.
@pytest.mark.filterwarnings("ignore:Both `past_key_values` and `cache` are set:FutureWarning")
@pytest.mark.parametrize("config", TOKENS_OF_ITS_OWN.values(), ids=TOKENS_OF_ITS_OWN.keys())
@pytest.mark.parametrize("when", ["before", "after"])
def test_an_adapter_with_tokens_of_its_own_runs_without_the_cache(config: PeftConfig, when: str) -> None:
    model = make_model("llama")
    expected = text(adapted(config))
    if when == "before":
        wrapped = adapted(config, model=model)
    with kvhybrid.attach(model, config=CONFIG) as attachment:
        if when == "after":
            wrapped = adapted(config, model=model)
        with pytest.warns(UserWarning, match="an adapter with tokens of its own"):
            assert torch.equal(text(wrapped), expected)
        with wrapped.disable_adapter():
            first = text(wrapped)
            assert torch.equal(text(wrapped), first)
        assert torch.equal(text(wrapped), expected)
        assert cached(attachment) == 39
