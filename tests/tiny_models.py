"""A tiny model of any causal language model class that transformers has, made from its default configuration.

Sizes are found by name and shrunk; what cannot be made small this way raises, and the sweep prints why.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

VOCAB = 97
LAYERS = 6  # so that one in five or six is of the rarer kind
HEADS = 6
MOST_PARAMETERS = 25_000_000

# The first pattern that matches an attribute's whole name decides.
SIZES: list[tuple[str, Any]] = [
    (r"num_(hidden_)?layers|n_layers?|(en|de)coder_layers", LAYERS),
    (
        r"(num_attention|(en|de)coder_attention|swa_num_attention|num|n|mamba_n|linear_num_value)_heads?",
        HEADS,
    ),
    (r"n_head|linear_num_heads|linear_num_key_heads", HEADS),
    (r"qk_head_dim", 16),
    (r"head_dim|kv_channels|attention_head_dim|global_head_dim", 8),
    (r".*head_dim|mamba_d_head|qk_.*_dim", 8),
    (r"hidden_size|n_embd|d_model|embedding_size|word_embed_proj_dim", 48),
    (r"(mamba_)?chunk_size", 16),
    (r".*(intermediate_size|ffn_dim|hidden_size|ffn_hidden_size)|dim_ff|dff|d_ff|n_inner", 32),
    (r".*lora_rank|.*_rank", 8),
    (r".*_token_(id|index)", 93),
    (r".*vocab_size.*", VOCAB),
    (r"num_experts_per_tok(en)?|top_k|moe_topk|moe_k", 2),
    (r"n_group|topk_group|num_expert_group|n_groups|mamba_n_groups", 1),
    (r".*num.*experts|moe_num_experts", 4),
    (r"first_k_dense_replace", 1),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len", 512),
    (r"sliding_window(_size)?|window_size|attention_window|attention_chunk_size", 12),
    (r"mamba_d_state|state_size|time_step_rank|mamba_dt_rank", 8),
    (r"num_kv_shared_layers", 2),
    (r"query_pre_attn_scalar", 8),
]

TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# What some configurations leave open and their models need.
DEFAULTS = {"head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}

# What the names do not tell: layers of two kinds, sizes that must agree, what has no default.
HYBRID_MAMBA = {"mamba_n_heads": HEADS, "mamba_d_head": 16, "mamba_expand": 2, "mamba_n_groups": 1}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {**HYBRID_MAMBA, "attn_layer_indices": [2, 5]},
    "codegen": {"n_embd": 64, "n_head": 4, "rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * (LAYERS // 2),
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "falcon_h1": {**HYBRID_MAMBA, "mamba_d_ssm": 96},
    "gemma3n_text": {
        "num_hidden_layers": 10,
        "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 2,
        "num_kv_shared_layers": 5,
        "activation_sparsity_pattern": [0.0] * 10,
        "intermediate_size": 32,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "gpt_oss": {"num_local_experts": 4},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {**HYBRID_MAMBA, "layer_types": ["mamba", "attention"] * (LAYERS // 2)},
    "jamba": {"use_mamba_kernels": False},
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 8, "num_attention_heads": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (LAYERS // 2), "num_dense_layers": 1},
    "xmod": {"default_language": "en_XX"},
    "xlm": {"emb_dim": 48, "causal": True, "n_words": VOCAB},
}


def family_names() -> list[str]:
    """Return the model types with a causal language model, as this transformers names them."""
    return sorted(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in CONFIG_MAPPING)


def small_values(config: PretrainedConfig) -> dict[str, Any]:
    """Return arguments that make a configuration like ``config``, but small."""
    values: dict[str, Any] = {}
    written = config.to_dict()
    layers = [written[name] for name in written if re.fullmatch(SIZES[0][0], name) and written[name]]
    heads = max((written.get(name) or 0 for name in ("num_attention_heads", "n_head")), default=0)
    for name, value in written.items():
        inner = config.__dict__.get(name)
        if hasattr(inner, "to_dict"):
            values[name] = type(inner)(**small_values(inner))
        elif name in TOKENS:
            values[name] = TOKENS[name]
        elif name in ("num_key_value_heads", "num_kv_heads"):
            values[name] = HEADS if value == heads else 1 if value == 1 else 2
        elif isinstance(value, list | tuple) and len(value) > LAYERS and len(value) in layers:
            values[name] = value[:LAYERS]
        elif not name.startswith("_"):
            values.update(_small_value(name, value))
    if "is_decoder" in written and not getattr(config, "is_encoder_decoder", False):
        values["is_decoder"] = True
    return {**values, **SPECIAL.get(config.model_type, {})}


def _small_value(name: str, value: Any) -> dict[str, Any]:
    if value is None:
        return {name: DEFAULTS[name]} if name in DEFAULTS else {}
    if type(value) is not int or value <= 0:
        return {}
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
    return {name: min(size, value)} if size is not None else {}


def small_model(family: str) -> PreTrainedModel:
    """Return a tiny model of that type with sharp logits; raises whatever keeps it from being made."""
    config_class = CONFIG_MAPPING[family]
    config = config_class(**small_values(config_class()))
    torch.manual_seed(0)
    with torch.device("meta"):
        count = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters even when shrunk")
    model = AutoModelForCausalLM.from_config(config)
    return sharpened(model)


def sharpened(model: PreTrainedModel) -> PreTrainedModel:
    """Return ``model`` with logits far apart, so that equal tokens mean equal attention."""
    for name, weight in model.named_parameters():
        # Default weights are so small that attention hardly matters and every prompt repeats one token.
        if weight.dim() == 2 and "embed" not in name and "wte" not in name:
            weight.data.mul_(4.0)
    # No early end: a text that stops at once would test nothing.
    model.generation_config.eos_token_id = None
    return model.float().eval()
