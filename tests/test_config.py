"""Configuration: sources, ranges, refusals, presets."""

import json
import math
import pickle
import re
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvhybrid import CacheStrategy, ConfigError, KVCacheConfig, KVHybridError, UnsupportedError
from kvhybrid.config import ABSENT
from kvhybrid.presets import PRESETS, SWITCHES, ConfigValues, PresetName

pytestmark = pytest.mark.usefixtures("clean_environment")

# Every preset by the numbers that its users were promised.
PROMISED = {
    "high_performance": "max_tokens=16384 cache_strategy=adaptive use_compression=False dtype=float16 "
    "enable_prefetch=True prefetch_size=8 pin_memory=True non_blocking=True",
    "memory_efficient": "max_tokens=4096 cache_strategy=paged use_compression=True compression_ratio=0.2 "
    "use_quantization=True quantization_bits=4 max_memory_mb=2048 enable_gc=True gc_threshold=0.7",
    "balanced": "max_tokens=8192 cache_strategy=adaptive use_compression=True compression_ratio=0.3 "
    "use_quantization=False enable_prefetch=True prefetch_size=4 enable_persistence=True",
    "high_traffic": "max_tokens=16384 cache_strategy=adaptive use_compression=True compression_ratio=0.3 "
    "enable_prefetch=True prefetch_size=16 num_workers=32 enable_persistence=True",
    "low_latency": "max_tokens=8192 cache_strategy=lru use_compression=False dtype=float16 "
    "enable_prefetch=True prefetch_size=8 pin_memory=True non_blocking=True",
    "memory_constrained": "max_tokens=2048 cache_strategy=paged use_compression=True compression_ratio=0.1 "
    "use_quantization=True quantization_bits=4 max_memory_mb=1024 enable_gc=True gc_threshold=0.6",
}

# A value outside the range of each field, and a word that its message must hold.
WRONG = {
    "max_tokens": (0, "2147483647"),
    "max_memory_mb": (0, "above 0"),
    "state_memory_mb": (0, "above 0"),
    "cache_strategy": ("lfu", "adaptive"),
    "block_size": (48, "power of two"),
    "dtype": ("int8", "bfloat16"),
    "use_compression": ("perhaps", "true or false"),
    "compression_ratio": (1.5, "at most 1"),
    "compression_scorer": ("guess", "keydiff"),
    "use_quantization": ("perhaps", "true or false"),
    "quantization_bits": (5, "4, 8 or 16"),
    "enable_gc": ("perhaps", "true or false"),
    "gc_threshold": (math.nan, "at most 1"),
    "enable_prefetch": ("perhaps", "true or false"),
    "prefetch_size": (0, "1024"),
    "max_pinned_share": (0.95, "a number from 0 to 0.9"),
    "pin_memory": ("perhaps", "true or false"),
    "non_blocking": ("perhaps", "true or false"),
    "enable_persistence": ("perhaps", "true or false"),
    "persistence_path": (7, "path"),
    "reproducible": ("perhaps", "true or false"),
    "num_workers": (129, "128"),
    "host_memory_mb": (-1, "above 0"),
    "disk_gb": (math.inf, "above 0"),
    "shared_url": (7, "text"),
    "tenant_isolation": ("perhaps", "true or false"),
}

# A value in range of each field whose feature is not there yet.
ASKED = {
    "enable_persistence": True,
    "persistence_path": "somewhere",
    "host_memory_mb": 64,
    "disk_gb": 1,
    "shared_url": "redis://user:hush@localhost",
}


def is_absent(field, value):
    return field in ABSENT and value is not False


def test_arguments_are_keyword_only():
    with pytest.raises(TypeError):
        KVCacheConfig(4096)


def test_a_configuration_cannot_be_changed():
    config = KVCacheConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.max_tokens = 1


def test_equal_configurations_are_equal_and_hash_alike():
    assert KVCacheConfig(max_tokens=64) == KVCacheConfig(max_tokens=64)
    assert hash(KVCacheConfig(max_tokens=64)) == hash(KVCacheConfig(max_tokens=64))
    assert KVCacheConfig(max_tokens=64) != KVCacheConfig(max_tokens=128)


def test_every_field_has_a_type_for_callers_and_a_wrong_value_here():
    fields = set(KVCacheConfig.model_fields)
    assert set(ConfigValues.__annotations__) == fields
    assert set(WRONG) == fields
    assert set(ASKED) == ABSENT


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_refused_with_field_value_and_range(name):
    value, allowed = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        KVCacheConfig(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{name}=")
    assert allowed in message
    assert name == "shared_url" or repr(value) in message


def test_every_wrong_value_is_named_at_once():
    with pytest.raises(ConfigError, match=r"max_tokens=0.*num_workers=0"):
        KVCacheConfig(max_tokens=0, num_workers=0)


@pytest.mark.parametrize(
    "name", ["max_tokens", "max_memory_mb", "num_workers", "prefetch_size", "block_size"]
)
def test_a_flag_is_not_taken_for_a_number(name):
    with pytest.raises(ConfigError, match=name):
        KVCacheConfig(**{name: True})


def test_an_unknown_field_is_refused_with_a_guess():
    with pytest.raises(ConfigError, match="max_token: no such field; did you mean max_tokens"):
        KVCacheConfig(max_token=5)


def test_a_budget_below_one_page_is_refused():
    with pytest.raises(ConfigError, match=r"max_tokens=32: must be at least block_size=64"):
        KVCacheConfig(max_tokens=32)


@pytest.mark.parametrize("name", sorted(ABSENT))
def test_what_is_not_there_yet_is_refused_by_name_and_value(name):
    with pytest.raises(UnsupportedError, match=rf"{name}=") as caught:
        KVCacheConfig(**{name: ASKED[name]})
    assert isinstance(caught.value, NotImplementedError)
    assert isinstance(caught.value, KVHybridError)


def test_a_detail_says_nothing_without_its_switch():
    with pytest.raises(ConfigError, match="prefetch_size=9: says nothing without enable_prefetch=True"):
        KVCacheConfig(prefetch_size=9)
    assert KVCacheConfig(prefetch_size=9, enable_prefetch=True).prefetch_size == 9
    with pytest.raises(ConfigError, match=r"gc_threshold=0.5: says nothing without enable_gc=True"):
        KVCacheConfig(gc_threshold=0.5)
    assert KVCacheConfig(gc_threshold=0.5, enable_gc=True).gc_threshold == 0.5


def test_presets_hold_the_promised_numbers():
    assert set(PRESETS) == set(PROMISED) == set(typing.get_args(PresetName))
    for name, values in PRESETS.items():
        shown = {f"{field}={value}" for field, value in values.items()}
        assert shown == set(PROMISED[name].split()), name


def test_the_low_latency_preset_works():
    config = KVCacheConfig.preset("low_latency")
    assert (config.max_tokens, config.dtype, config.prefetch_size) == (8192, "float16", 8)
    assert config.pin_memory
    assert config.non_blocking


def test_the_strategies_that_are_there_are_taken():
    assert KVCacheConfig.preset("high_performance").cache_strategy is CacheStrategy.ADAPTIVE
    assert KVCacheConfig(cache_strategy="Adaptive").cache_strategy is CacheStrategy.ADAPTIVE


@pytest.mark.parametrize("threshold", [0.001, 0.5, 1])
def test_collection_starts_at_any_fraction_of_the_budget(threshold):
    assert KVCacheConfig(enable_gc=True, gc_threshold=threshold).gc_threshold == threshold


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, math.inf, True])
def test_a_threshold_that_is_no_fraction_is_refused(threshold):
    with pytest.raises(ConfigError, match=r"gc_threshold=.*above 0 and at most 1"):
        KVCacheConfig(enable_gc=True, gc_threshold=threshold)


@pytest.mark.parametrize(
    "name", [name for name in PRESETS if any(is_absent(*item) for item in PRESETS[name].items())]
)
def test_a_preset_ahead_of_its_time_names_every_missing_field_and_the_way_round(name):
    with pytest.raises(UnsupportedError) as caught:
        KVCacheConfig.preset(name)
    message = str(caught.value)
    asked = [field for field, value in PRESETS[name].items() if is_absent(field, value)]
    assert asked
    for field in asked:
        assert f"{field}=" in message
    way_round = re.search(r"KVCacheConfig\.preset\(.*\)$", message)
    assert way_round
    config = eval(way_round[0], {"KVCacheConfig": KVCacheConfig})  # the message is a recipe: follow it
    assert config.max_tokens == PRESETS[name]["max_tokens"]


def test_turning_a_switch_off_takes_the_presets_detail_away():
    config = KVCacheConfig.preset("low_latency", enable_prefetch=False)
    assert config.prefetch_size == KVCacheConfig().prefetch_size


def test_an_unknown_preset_is_refused_with_the_list():
    with pytest.raises(ConfigError, match=r"preset='fast': must be one of .*low_latency"):
        KVCacheConfig.preset("fast")


def test_sources_override_each_other_in_order(monkeypatch, clean_environment):
    (clean_environment / ".env").write_text(
        "DATABASE_URL=elsewhere\nKVHYBRID_MAX_TOKENS=1024\nKVHYBRID_NUM_WORKERS=2\nKVHYBRID_PREFETCH_SIZE=3\n"
    )
    monkeypatch.setenv("KVHYBRID_NUM_WORKERS", "3")
    monkeypatch.setenv("kvhybrid_block_size", "16")
    config = KVCacheConfig.preset("low_latency", block_size=32)
    assert config.dtype == "float16"  # the preset's
    assert (config.max_tokens, config.prefetch_size) == (1024, 3)  # the file's, over the preset
    assert config.num_workers == 3  # the environment's, over the file
    assert config.block_size == 32  # the argument's, over the environment
    assert KVCacheConfig(enable_prefetch=True, _env_file=None).max_tokens == 8192


def test_an_empty_variable_counts_as_unset(monkeypatch):
    monkeypatch.setenv("KVHYBRID_MAX_TOKENS", "")
    assert KVCacheConfig().max_tokens == 8192


def test_a_variable_that_names_no_field_is_refused(monkeypatch):
    monkeypatch.setenv("KVHYBRID_MAX_TOKEN", "5")
    with pytest.raises(ConfigError, match=r"KVHYBRID_MAX_TOKEN \(environment\).*KVHYBRID_MAX_TOKENS"):
        KVCacheConfig()


def test_a_line_of_the_file_that_names_no_field_is_refused(clean_environment):
    (clean_environment / ".env").write_text("KVHYBRID_BLOCKSIZE=16\n")
    with pytest.raises(ConfigError, match=r"KVHYBRID_BLOCKSIZE \(\.env file\).*KVHYBRID_BLOCK_SIZE"):
        KVCacheConfig()


def test_a_wrong_variable_is_refused_like_a_wrong_argument(monkeypatch):
    monkeypatch.setenv("KVHYBRID_MAX_TOKENS", "many")
    with pytest.raises(ConfigError, match="max_tokens='many'"):
        KVCacheConfig()


@pytest.mark.parametrize("url", ["redis://user:hush@localhost", ["redis://user:hush@localhost"]])
def test_secrets_are_in_no_message(url):
    with pytest.raises(KVHybridError) as caught:
        KVCacheConfig(shared_url=url)
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_dtypes_are_taken_from_torch_or_by_name():
    torch = pytest.importorskip("torch")
    for given_dtype in (torch.bfloat16, "bfloat16", "torch.bfloat16"):
        config = KVCacheConfig(dtype=given_dtype)
        assert config.dtype == "bfloat16"
        assert config.torch_dtype is torch.bfloat16
    assert KVCacheConfig().torch_dtype is None
    with pytest.raises(ConfigError, match=r"dtype=torch\.int8"):
        KVCacheConfig(dtype=torch.int8)


def test_cuda_only_settings_are_ignored_elsewhere_with_one_warning():
    config = KVCacheConfig(pin_memory=True, non_blocking=True)
    assert config.host_copies("cuda") == (True, True)
    with pytest.warns(UserWarning, match="pin_memory and non_blocking are ignored on cpu") as caught:
        assert config.host_copies("cpu") == (False, False)
    assert len(caught) == 1
    assert KVCacheConfig().host_copies("cpu") == (False, False)


def test_repr_shows_the_size_and_what_was_changed():
    assert repr(KVCacheConfig()) == "KVCacheConfig(max_tokens=8192, block_size=64)"
    assert (
        repr(KVCacheConfig(dtype="float16"))
        == "KVCacheConfig(max_tokens=8192, block_size=64, dtype='float16')"
    )


def test_a_configuration_survives_pickle():
    config = KVCacheConfig(max_tokens=4096, dtype="float16")
    assert pickle.loads(pickle.dumps(config)) == config


def test_every_switch_and_detail_is_a_field():
    assert {*SWITCHES, *SWITCHES.values()} <= set(KVCacheConfig.model_fields)


valid_values = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(1024, 2**31 - 1),
        "max_memory_mb": st.none() | st.floats(0.01, 2**30),
        "state_memory_mb": st.none() | st.floats(0.01, 2**30),
        "block_size": st.integers(0, 10).map(lambda n: 2**n),
        "dtype": st.sampled_from([None, "float16", "bfloat16", "float32"]),
        "enable_gc": st.booleans(),
        "enable_prefetch": st.booleans(),
        "pin_memory": st.booleans(),
        "non_blocking": st.booleans(),
        "num_workers": st.integers(1, 128),
        "reproducible": st.booleans(),
        "tenant_isolation": st.booleans(),
    },
)


@given(valid_values)
def test_whatever_is_in_range_is_kept_and_survives_json(values):
    config = KVCacheConfig(**values, _env_file=None)
    assert {name: getattr(config, name) for name in values} == values
    assert KVCacheConfig(**json.loads(json.dumps(config.to_dict())), _env_file=None) == config


anything = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.integers(), max_size=2)
)


@given(st.dictionaries(st.sampled_from(sorted(KVCacheConfig.model_fields)), anything, max_size=4))
def test_anything_else_is_a_typed_error(values):
    try:
        config = KVCacheConfig(**values, _env_file=None)
    except (ConfigError, UnsupportedError) as error:
        assert any(name in str(error) for name in values)  # noqa: PT017  # success is fine too
    else:
        assert config.max_tokens >= config.block_size


@pytest.mark.parametrize("bits", [4, 8])
def test_quantization_is_taken_with_its_bits(bits):
    assert KVCacheConfig(use_quantization=True, quantization_bits=bits).ladder == (bits,)
    assert KVCacheConfig().ladder == ()


@pytest.mark.parametrize("strategy", [CacheStrategy.PAGED, CacheStrategy.ADAPTIVE])
def test_paged_and_adaptive_step_down_by_way_of_8_bits(strategy):
    assert KVCacheConfig(cache_strategy=strategy).ladder == ()
    ladders = [
        KVCacheConfig(cache_strategy=strategy, use_quantization=True, quantization_bits=bits).ladder
        for bits in (4, 8)
    ]
    assert ladders == [(8, 4), (8,)]


@pytest.mark.parametrize("name", ["memory_efficient", "memory_constrained"])
def test_the_presets_that_save_memory_work(name):
    config = KVCacheConfig.preset(name)
    assert (config.cache_strategy, config.ladder) == (CacheStrategy.PAGED, (8, 4))
    assert config.compression_ratio == PRESETS[name]["compression_ratio"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_quantization": True}, "says nothing with quantization_bits=16; must be 4 or 8"),
        ({"quantization_bits": 8}, "quantization_bits=8: says nothing without use_quantization=True"),
        (
            {"use_quantization": True, "quantization_bits": 8, "block_size": 8},
            "block_size=8: must be at least 16",
        ),
        (
            {"use_quantization": True, "quantization_bits": 4, "reproducible": True},
            "reproducible=True: not with use_quantization=True",
        ),
    ],
)
def test_quantization_that_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        KVCacheConfig(**values)
