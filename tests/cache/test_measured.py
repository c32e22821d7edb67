"""What is read off a model by running it: shapes by layer, and which layer keeps what is no K and V."""

from types import SimpleNamespace

import pytest
import torch
from families import CONFIGS, make_model
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3nTextConfig,
    JambaConfig,
    Lfm2Config,
    MambaConfig,
    MiniMaxConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    T5Config,
    T5ForConditionalGeneration,
    cache_utils,
)

from kvhybrid import KVCache, KVCacheConfig, KVLayout, LayoutError, UnsupportedError
from kvhybrid.cache.measured import measure_layers
from kvhybrid.model.versions import CACHE, over

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", list(CONFIGS))
def test_plain_models_measure_as_their_configurations_say(family):
    model = make_model(family, dtype=torch.bfloat16)
    layout = KVCache.for_model(model, KVCacheConfig(block_size=16)).layout
    assert layout == KVLayout.from_model_config(model.config, dtype="bfloat16", block_size=16)


def test_layers_that_share_anothers_k_and_v_keep_none():
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3nTextConfig(
        **SMALL,
        head_dim=12,
        num_hidden_layers=4,
        layer_types=kinds,
        num_kv_shared_layers=2,
        sliding_window=2,
        laurel_rank=4,
        altup_num_inputs=2,
        vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8,
        activation_sparsity_pattern=[0.0] * 4,
    )
    shapes = measure_layers(make(config)).shapes
    assert [shape is not None for shape in shapes[:2]] == [True, True]
    assert not any(shapes[2:])


def test_latent_attention_measures_as_what_reaches_the_cache():
    config = DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4},
        num_hidden_layers=2,
        first_k_dense_replace=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
    )
    model = make(config)
    with torch.no_grad():
        layer = model(torch.arange(5)[None], use_cache=True)[CACHE].layers[1]
    shape = measure_layers(model).shapes[1]
    assert (1, shape.num_kv_heads, 5, shape.head_dim) == layer.keys.shape
    assert (1, shape.num_kv_heads, 5, shape.value_head_dim) == layer.values.shape
    assert shape.head_dim != shape.value_head_dim


HYBRID = {
    "conv": (Lfm2Config, {"layer_types": ["full_attention", "conv"], "num_hidden_layers": 2}),
    "linear_attention": (
        Qwen3NextConfig,
        {
            "head_dim": 12,
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 0,
        },
    ),
    "mamba": (
        JambaConfig,
        {
            "num_hidden_layers": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 0,
            "expert_layer_period": 4,
            "expert_layer_offset": 3,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
        },
    ),
}


@pytest.mark.parametrize("kind", HYBRID)
def test_a_layer_with_a_state_is_measured_or_refused_by_number_and_kind(kind):
    config, values = HYBRID[kind]
    made = config(**{**SMALL, **values})
    made.use_mamba_kernels = False  # or transformers 4 asks for a GPU
    if hasattr(cache_utils, "LinearAttentionCacheLayerMixin"):
        measured = measure_layers(make(made))
        assert [shape is None for shape in measured.shapes] == [False, True]
        assert measured.state_bytes == {"conv": 576, "linear_attention": 1280, "mamba": 3072}[kind]
        return
    with pytest.raises(UnsupportedError, match=rf"layer 1 \(({kind}|linear_attention)\) keeps a .*state"):
        measure_layers(make(made))


def test_models_without_k_and_v_are_refused():
    state = make(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(UnsupportedError, match=r"layer 0 .*keeps a .*state"):
        measure_layers(state)
    both = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=4, num_layers=1, num_heads=4))
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        measure_layers(both)


@pytest.mark.skipif(
    not hasattr(cache_utils, "LinearAttentionCacheLayerMixin"), reason="transformers 4 refuses all of them"
)
@pytest.mark.parametrize(
    ("config", "values", "layer"),
    [
        (MiniMaxConfig, {"head_dim": 12, "num_local_experts": 2}, r"layer 1 \(linear_attention\)"),
        (RecurrentGemmaConfig, {"block_types": ("recurrent", "attention")}, r"layer 0 \((linear_|recurrent)"),
    ],
)
def test_a_state_in_a_place_of_its_models_own_is_refused_by_number_and_kind(config, values, layer):
    made = config(**{**SMALL, "num_hidden_layers": 2, **values})
    with pytest.raises(UnsupportedError, match=layer):
        measure_layers(make(made))


def kept(model, monkeypatch, past):
    monkeypatch.setattr(model, "forward", lambda **kwargs: SimpleNamespace(**over(past)))
    return measure_layers(model)


def layer(key, value=None):
    return SimpleNamespace(keys=torch.zeros(key), values=torch.zeros(value if value is not None else key))


@pytest.mark.parametrize(
    ("layers", "error", "match"),
    [
        ([layer((1, 2, 3, 4)), layer((1, 3, 4))], UnsupportedError, r"layer 1 keeps K \[1, 3, 4\]"),
        ([layer((1, 2, 3, 4), (1, 2, 2, 4))], UnsupportedError, "layer 0"),
        ([layer((1, 2, 9, 4))], UnsupportedError, "layer 0 keeps K of 9 tokens for 3"),
        ([SimpleNamespace(keys=None, values=None)], LayoutError, "any of its 1 layers"),
        (None, LayoutError, "without K and V by layer"),
    ],
)
def test_what_does_not_look_like_k_and_v_is_refused_by_layer(layers, error, match, monkeypatch):
    with pytest.raises(error, match=match):
        kept(make_model("llama"), monkeypatch, SimpleNamespace(layers=layers))


def test_a_model_that_cannot_run_on_tokens_alone_is_refused_with_its_reason(monkeypatch):
    model = make_model("llama").train()

    def fail(**kwargs):
        raise KeyError("pixel_values")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(UnsupportedError, match="token ids alone: KeyError: 'pixel_values'"):
        measure_layers(model)
    assert model.training
