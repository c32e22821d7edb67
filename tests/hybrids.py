"""Tiny random models whose layers keep a state beside or instead of K and V: both kinds in each of them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VOCAB = 331
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
FULL, STATE = "full_attention", "linear_attention"

# Configuration class and what it is made with; a version of transformers that lacks one is not asked for it.
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": (
        "Lfm2Config",
        {
            **SIZES,
            "num_hidden_layers": 4,
            "layer_types": ["conv", FULL, "conv", FULL],
            "block_auto_adjust_ff_dim": False,
        },
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            **SIZES,
            **LINEAR,
            "num_hidden_layers": 4,
            "layer_types": [STATE, STATE, FULL, STATE],
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    ),
    "jamba": (
        "JambaConfig",
        {
            **SIZES,
            "num_hidden_layers": 4,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "num_experts": 4,
            "mamba_d_state": 8,
            "use_mamba_kernels": False,
        },
    ),
    "bamba": ("BambaConfig", {**SIZES, **MAMBA, "num_hidden_layers": 3, "attn_layer_indices": [1]}),
    "falcon-h1": (
        "FalconH1Config",
        {**SIZES, **MAMBA, "num_hidden_layers": 2, "head_dim": 8, "mamba_d_ssm": 96},
    ),
    "granite-hybrid": (
        "GraniteMoeHybridConfig",
        {
            **SIZES,
            **MAMBA,
            "num_hidden_layers": 3,
            "layer_types": [STATE, FULL, STATE],
            "num_local_experts": 2,
            "shared_intermediate_size": 32,
        },
    ),
    "zamba2": (
        "Zamba2Config",
        {
            **{name: size for name, size in SIZES.items() if name != "num_key_value_heads"},
            "num_hidden_layers": 3,
            "layers_block_type": [STATE, "hybrid", STATE],
            "mamba_d_state": 8,
            "mamba_ngroups": 2,
            "n_mamba_heads": 6,
            "chunk_size": 8,
            "use_mem_rope": True,
        },
    ),
    "nemotron-h": (
        "NemotronHConfig",
        {
            **SIZES,
            "head_dim": 8,
            "layers_block_type": [STATE, "moe", FULL, "mlp", STATE],
            "mamba_num_heads": 6,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "ssm_state_size": 8,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
        },
    ),
    "olmo-hybrid": (
        "OlmoHybridConfig",
        {**SIZES, **LINEAR, "num_hidden_layers": 3, "layer_types": [STATE, FULL, STATE]},
    ),
    "qwen3.5": (
        "Qwen3_5TextConfig",
        {**SIZES, **LINEAR, "num_hidden_layers": 3, "layer_types": [STATE, FULL, STATE], "head_dim": 8},
    ),
    "zaya": (
        "ZayaConfig",
        {
            **SIZES,
            "num_hidden_layers": 2,
            "head_dim": 8,
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "router_hidden_size": 16,
        },
    ),
}


def known() -> list[str]:
    """Return the families that this version of transformers has."""
    return [name for name, (config, _) in CONFIGS.items() if hasattr(transformers, config)]


def make_hybrid(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a model with large weights, so that equal tokens mean equal states and equal attention."""
    torch.manual_seed(seed)
    name, values = CONFIGS[family]
    config = getattr(transformers, name)(**copy.deepcopy({**values, **changes}))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    for place, weight in model.named_parameters():
        if weight.dim() == 2 and "embed" not in place:
            weight.data.mul_(4.0)
        elif weight.dim() == 3 and "conv" in place:
            weight.data.normal_(std=0.5)
    # No early end: a text that stops at once would test nothing.
    model.generation_config.eos_token_id = None
    return model.eval()
