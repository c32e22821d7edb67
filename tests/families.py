"""Tiny random models of each family, awkward on purpose: odd lengths, grouped-query heads, sharp logits."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
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


def make_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model whose logits are far apart, so that equal tokens mean equal attention."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[family])  # a model writes its attention implementation into it
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
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
