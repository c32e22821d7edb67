"""What the paged route may not be asked for is seen in a model's masks, at any length of text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from families import VOCAB, make_model
from transformers import AutoModelForCausalLM, DogeConfig, Llama4TextConfig, MistralConfig
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.model.masks import UnknownMaskError, obstacle_to_pages, window_of
from kvhybrid.model.probe import obstacle_to_paging
from kvhybrid.model.routes import Route

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_causal_masks_have_no_window() -> None:
    assert window_of(causal_mask_function) is None


@pytest.mark.parametrize("window", [1, 12, 4096, 2**18])
def test_windows_are_measured_at_any_size(window: int) -> None:
    assert window_of(sliding_window_causal_mask_function(window)) == window


@pytest.mark.parametrize(
    "mask_function",
    [
        chunked_causal_mask_function(8192, torch.zeros(1, dtype=torch.long)),
        lambda batch, head, query, key: key >= 0,
        lambda batch, head, query, key: key < query,
        lambda batch, head, query, key: (key <= query) & (key % 2 == query % 2),
        lambda batch, head, query, key: (key <= query) & ((key < 4) | (key > query - 8)),
        and_masks(causal_mask_function, lambda batch, head, query, key: torch.ones(9)[key] > 0),
    ],
    ids=["chunks", "both ways", "not itself", "every other", "sinks", "looked up"],
)
def test_whatever_else_a_mask_hides_is_not_taken_for_a_window(mask_function: object) -> None:
    with pytest.raises(UnknownMaskError):
        window_of(mask_function)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral-window"])
def test_plain_models_have_no_obstacle(family: str) -> None:
    assert obstacle_to_paging(make_model(family)) is None


def test_chunks_longer_than_the_probe_are_seen() -> None:
    config = Llama4TextConfig(
        **SMALL,
        intermediate_size_mlp=64,
        num_local_experts=2,
        attention_chunk_size=8192,
        no_rope_layers=[1, 0],
    )
    model = make(config)
    with kvhybrid.attach(model, config=KVCacheConfig(max_tokens=512, block_size=16)) as attachment:
        assert attachment.route is Route.MATERIALISED
        assert attachment.reason == "layer 0: what a token sees depends on its place in the text"


def test_a_window_that_attention_is_not_told_of_is_seen() -> None:
    model = make(MistralConfig(**SMALL, sliding_window=4096))
    model.model.layers[1].self_attn.config = MistralConfig(**SMALL, sliding_window=None)
    model.model.layers[1].self_attn.config._attn_implementation = "kvhybrid"
    found = obstacle_to_paging(model)
    assert found == "layer 1: its mask has a window of 4096, its attention is told of None"


def test_masks_of_the_models_own_making_are_seen() -> None:
    config = DogeConfig(**{name: value for name, value in SMALL.items() if name != "head_dim"})
    found = obstacle_to_paging(make(config))
    assert found is not None
    assert found.endswith("it attends under a mask that it made itself")


def test_a_model_that_attends_without_us_has_an_obstacle() -> None:
    assert obstacle_to_pages(make_model("llama")) == (
        "it does not attend through transformers' attention interface"
    )


def test_a_model_that_fails_under_our_attention_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")

    def fail(*args: object, **kwargs: object) -> None:
        raise KeyError("rope")

    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", fail)
    assert obstacle_to_paging(model) == "KeyError: 'rope'"
    assert model.config._attn_implementation == "sdpa"
