"""Tiny random models of each family, awkward on purpose: odd lengths, grouped-query heads, sharp logits."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 97

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in SIZES.items() if name not in names}


CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**_without("head_dim")),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**{**SIZES, "sliding_window": None}),
    "mistral-window": MistralConfig(**{**SIZES, "sliding_window": 24}),
    "gpt-neox": GPTNeoXConfig(**_without("num_key_value_heads", "head_dim")),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=48,
        n_layer=3,
        n_head=6,
        n_positions=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ),
}

# Attention that torch's own function does not compute: these run on eager code of their own.
EAGER_CONFIGS: dict[str, PretrainedConfig] = {
    # A cap that bends most scores of these models, and layers with a window by turns.
    "gemma2": Gemma2Config(
        **{**SIZES, "sliding_window": 24, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 0.5}
    ),
    "gpt-oss": GptOssConfig(
        **{
            **SIZES,
            "sliding_window": 24,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        }
    ),
}


def make_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model whose logits are far apart, so that equal tokens mean equal attention."""
    torch.manual_seed(seed)
    implementation = "eager" if family in EAGER_CONFIGS else "sdpa"
    # A model writes its attention implementation into its configuration.
    config = copy.deepcopy((CONFIGS | EAGER_CONFIGS)[family])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    for name, weight in model.named_parameters():
        # Default weights are so small that attention hardly matters and every prompt repeats one token.
        if weight.dim() == 2 and "embed" not in name and "wte" not in name:
            weight.data.mul_(4.0)
    # No early end: a text that stops at once would test nothing.
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def prompt(length: int, *, seed: int = 0) -> torch.Tensor:
    """Return ``[1, length]`` random ids of the vocabulary's plain tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (1, length), generator=generator)
