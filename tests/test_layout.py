"""The layout of cached K and V: sizes, budgets, and what a model's configuration says."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvhybrid import ConfigError, KVLayout, LayoutError, UnsupportedError
from kvhybrid.layout import LayerShape
from kvhybrid.model.versions import over


def small(**changes):
    return KVLayout(**{"num_layers": 2, "num_kv_heads": 2, "head_dim": 64, **changes})


def llama(**changes):
    values = {
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_size": 256,
        "dtype": "bfloat16",
    }
    return SimpleNamespace(**{**values, **changes})


def test_bytes_count_keys_and_values_of_every_layer():
    layout = small(value_head_dim=32, dtype="bfloat16", block_size=16)
    assert layout.bytes_per_token == 2 * 2 * (64 + 32) * 2
    assert layout.bytes_per_page == 16 * layout.bytes_per_token


def test_values_are_as_wide_as_keys_unless_told():
    assert small().value_head_dim == 64


def test_a_layout_cannot_be_changed():
    with pytest.raises(AttributeError):
        small().num_layers = 3


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 0},
        {"num_kv_heads": -1},
        {"head_dim": 64.0},
        {"block_size": 48},
        {"block_size": 2048},
        {"dtype": "int8"},
    ],
)
def test_a_shape_that_cannot_be_is_refused_by_name(change):
    (name,) = change
    with pytest.raises(LayoutError, match=name):
        small(**change)


def test_torch_dtypes_and_names_are_the_same():
    torch = pytest.importorskip("torch")
    layout = small(dtype=torch.float16)
    assert layout == small(dtype="float16")
    assert layout.torch_dtype is torch.float16


def test_the_fingerprint_is_stable():
    assert (
        small().fingerprint == "3a2cca9cd109de30711fc7237d345e34"
    )  # a page written yesterday must be found tomorrow


@given(st.lists(st.tuples(*[st.integers(1, 4)] * 4), min_size=2, max_size=2))
def test_fingerprints_are_equal_exactly_when_layouts_are(shapes):
    first, second = (
        KVLayout(num_layers=a, num_kv_heads=b, head_dim=c, value_head_dim=d) for a, b, c, d in shapes
    )
    assert (first.fingerprint == second.fingerprint) == (first == second)


def shape(heads=2, width=64, value_width=64):
    return LayerShape(num_kv_heads=heads, head_dim=width, value_head_dim=value_width)


def test_layers_that_are_alike_make_the_plain_layout():
    assert KVLayout.of_layers([shape()] * 2) == small()
    assert KVLayout.of_layers([shape()] * 2).fingerprint == small().fingerprint
    assert small().layers == (shape(), shape())


def test_layers_that_differ_are_counted_one_by_one():
    layout = KVLayout.of_layers([shape(1, 8, 4), None, shape(2, 16, 16)], dtype="float16", block_size=16)
    assert layout.bytes_per_token == ((8 + 4) + 2 * (16 + 16)) * 2
    assert layout.kept_layers == (0, 2)
    assert (layout.num_layers, layout.num_kv_heads, layout.head_dim) == (3, 0, 0)


def test_layouts_of_differing_layers_are_told_apart():
    shapes = [shape(1), shape(2)]
    found = {KVLayout.of_layers(s).fingerprint for s in (shapes, shapes[::-1], [shape(1), None], [shape(1)])}
    assert len(found) == 4


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"shapes": (shape(), shape())}, "differ"),
        ({"shapes": (shape(), None, None)}, "num_layers=2"),
        ({"shapes": (shape(), None)}, "must be 0"),
    ],
)
def test_a_layout_is_written_one_way_only(change, match):
    with pytest.raises(LayoutError, match=match):
        small(**change)


def test_layers_that_keep_nothing_make_no_layout():
    with pytest.raises(LayoutError, match="none of the 2 layers"):
        KVLayout.of_layers([None, None])


def test_the_smaller_budget_wins():
    layout = small()  # 128 KiB a page
    assert layout.num_pages(8192) == 128
    assert layout.num_pages(8192, 1) == 8
    assert layout.num_pages(128, 1024) == 2


@given(st.integers(64, 2**31 - 1), st.floats(0.125, 2**20), st.integers(0, 10))
def test_no_budget_is_ever_exceeded(max_tokens, max_memory_mb, exponent):
    layout = small(block_size=2**exponent)
    try:
        pages = layout.num_pages(max_tokens, max_memory_mb)
    except ConfigError:
        assert max_tokens < layout.block_size or max_memory_mb * 2**20 < layout.bytes_per_page
    else:
        assert pages >= 1
        assert pages * layout.block_size <= max_tokens
        assert pages * layout.bytes_per_page <= max_memory_mb * 2**20


def test_a_budget_below_one_page_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"max_tokens=63: holds no page of block_size=64"):
        small().num_pages(63)
    with pytest.raises(ConfigError, match=r"max_memory_mb=0\.1: 104857 bytes hold no page of 131072 bytes"):
        small().num_pages(8192, 0.1)


def test_a_model_configuration_is_read_by_its_attributes():
    layout = KVLayout.from_model_config(llama(), block_size=16)
    assert layout == KVLayout(num_layers=4, num_kv_heads=2, head_dim=32, dtype="bfloat16", block_size=16)
    assert KVLayout.from_model_config(llama(), dtype="float16").dtype == "float16"


def test_the_text_part_of_a_multimodal_model_counts():
    nested = SimpleNamespace(text_config=llama(), hidden_size=7)
    assert KVLayout.from_model_config(nested) == KVLayout.from_model_config(llama())


def test_a_model_without_attention_is_refused():
    with pytest.raises(LayoutError, match="without attention"):
        KVLayout.from_model_config(SimpleNamespace(num_hidden_layers=4, hidden_size=64))


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"hidden_size": None}, "head_dim"),
        ({"hidden_size": 250}, "250"),
    ],
)
def test_what_is_missing_is_named(change, missing):
    with pytest.raises(LayoutError, match=missing):
        KVLayout.from_model_config(llama(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"layer_types": ["full_attention", "linear_attention"]},
        {"num_key_value_heads": [2, 2, 4, 4]},
        {"is_encoder_decoder": True},
    ],
)
def test_layers_that_differ_are_refused(change):
    with pytest.raises(UnsupportedError):
        KVLayout.from_model_config(llama(**change))


SMALL = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "LlamaConfig": {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2},
    "Qwen2Config": {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2},
    "Qwen3Config": {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 16},
    "MistralConfig": {**SMALL, "intermediate_size": 32, "num_key_value_heads": 1},
    "GPTNeoXConfig": {**SMALL, "intermediate_size": 32},
    "GPT2Config": {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "GPTBigCodeConfig": {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "multi_query": True},
    "FalconConfig": SMALL,
    "BloomConfig": {"vocab_size": 32, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "Gemma2Config": {**SMALL, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 16},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layout_is_what_the_model_puts_into_a_cache(family):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, family)(**FAMILIES[family])
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(torch.arange(5)[None], **over(cache), use_cache=True)
    layout = KVLayout.from_model_config(config)
    stored = [(layer.keys, layer.values) for layer in cache.layers]
    assert len(stored) == layout.num_layers
    for keys, values in stored:
        assert keys.shape == (1, layout.num_kv_heads, 5, layout.head_dim)
        assert values.shape == (1, layout.num_kv_heads, 5, layout.value_head_dim)
