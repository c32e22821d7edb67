"""Models that are no plain decoder of text: served where that is right, else refused in clear words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import SIZES, VOCAB, prompt
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    CLIPVisionConfig,
    EncoderDecoderModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.errors import LayoutError, UnsupportedError
from kvhybrid.model.versions import over

CONFIG = {"max_tokens": 512, "block_size": 16}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
BERT: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
}
BART: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
IMAGE = 90
REFUSED = {
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=VOCAB, d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=6)
        ),
        "encoder-decoder",
    ),
    "bart": (lambda: BartForConditionalGeneration(BartConfig(**BART)), "encoder-decoder"),
    "bert to bert": (
        lambda: EncoderDecoderModel(
            encoder=BertLMHeadModel(BertConfig(**BERT)).bert,
            decoder=BertLMHeadModel(BertConfig(**BERT, is_decoder=True, add_cross_attention=True)),
        ),
        "encoder-decoder",
    ),
    "classes of texts": (
        lambda: LlamaForSequenceClassification(LlamaConfig(**SIZES)),
        "LlamaForSequenceClassification does not generate",
    ),
    "classes of tokens": (lambda: LlamaForTokenClassification(LlamaConfig(**SIZES)), "does not generate"),
    "no head": (lambda: LlamaModel(LlamaConfig(**SIZES)), "LlamaModel does not generate"),
    "masked tokens": (lambda: BertForMaskedLM(BertConfig(**BERT)), "does not generate"),
    "images": (
        lambda: ViTModel(ViTConfig(**{**BERT, "image_size": 16, "patch_size": 8, "vocab_size": None})),
        "does not generate",
    ),
    "attention in both directions": (lambda: BertLMHeadModel(BertConfig(**BERT)), "no KV cache|other logits"),
    "a state": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2)),
        "without attention|state",
    ),
    "a layer": (lambda: torch.nn.Linear(3, 3), "Linear does not generate"),
    "a name": (lambda: "llama", "str does not generate"),
    "nothing": (lambda: None, "NoneType does not generate"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_and_left_as_it_was(name: str) -> None:
    make, reason = REFUSED[name]
    model: Any = make()
    before = dict(vars(model)) if isinstance(model, torch.nn.Module) else {}
    if before:
        model.eval()
    with pytest.raises((UnsupportedError, LayoutError), match=reason):
        kvhybrid.attach(model, config=KVCacheConfig(**CONFIG))
    assert not before or vars(model).keys() == before.keys()


@pytest.mark.parametrize(
    "make",
    [
        lambda: BartForCausalLM(BartConfig(**BART)),
        lambda: BertLMHeadModel(BertConfig(**BERT, is_decoder=True)),
    ],
    ids=["bart", "bert"],
)
def test_a_decoder_of_a_family_of_encoders_is_served(make: Any) -> None:
    model = make().eval()
    model.generation_config.eos_token_id = None
    model.generation_config.forced_eos_token_id = None
    ids = prompt(30)
    expected = model.generate(ids, **GREEDY)
    with kvhybrid.attach(model, config=KVCacheConfig(**CONFIG)) as attachment:
        for _ in range(2):
            assert torch.equal(model.generate(ids, **GREEDY), expected)
        assert attachment.cache.get_stats()["cached_tokens"] == 29


def test_a_model_of_images_and_text_reuses_text_alone() -> None:
    def make() -> LlavaForConditionalGeneration:
        torch.manual_seed(0)
        sight = CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=8,
        )
        config = LlavaConfig(vision_config=sight, text_config=LlamaConfig(**SIZES), image_token_index=IMAGE)
        model = LlavaForConditionalGeneration(config).eval()
        model.generation_config.eos_token_id = None
        return model

    own, model = make(), make()
    text = prompt(30)
    text[text == IMAGE] = 5
    shown = text.clone()
    shown[0, 3:7] = IMAGE
    first, second = torch.randn(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    with kvhybrid.attach(model, config=KVCacheConfig(**CONFIG)) as attachment:
        with pytest.warns(UserWarning, match="pixel_values") as said:
            found = [model.generate(shown, pixel_values=image, **GREEDY) for image in (first, second, first)]
        assert len(said) == 1
        for image, answer in zip((first, second, first), found, strict=True):
            assert torch.equal(answer, own.generate(shown, pixel_values=image, **GREEDY))
        assert attachment.cache.get_stats()["cached_tokens"] == 0
        for _ in range(2):
            assert torch.equal(model.generate(text, **GREEDY), own.generate(text, **GREEDY))
        assert attachment.cache.get_stats()["cached_tokens"] == 29
        session = attachment.cache.session("seen")
        with pytest.raises(UnsupportedError, match="pixel_values"):
            model.generate(shown, pixel_values=first, **over(session), **GREEDY)
