"""Model families by name: served on the route that is promised, with their own texts to the token."""

from __future__ import annotations

import pytest
import torch
import transformers
from compatibility import ALLOWED, examine
from families import make_model, prompt
from packaging.version import Version
from tiny_models import family_names, small_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig, MistralConfig
from transformers.utils import logging

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.model.attach import Attachment
from kvhybrid.model.packing import choose_packing
from kvhybrid.model.routes import Route
from kvhybrid.model.runner import Packing
from kvhybrid.model.versions import over

PAGED = [
    *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "phi", "phi3", "gemma", "olmo2"),
    *("granite", "cohere", "starcoder2", "stablelm", "glm4", "smollm3", "gpt_neox", "gpt2", "opt", "lfm2"),
    *("arcee", "cohere2", "exaone4", "gemma3_text", "glm4_moe", "gpt_bigcode", "granitemoe", "helium"),
    *("hunyuan_v1_dense", "nemotron", "olmoe", "persimmon", "phimoe", "qwen3_moe", "seed_oss"),
    # Layers of different shapes, and layers that share the K and V of others.
    *("gemma3n_text", "gemma4_text"),
    # Soft caps and sinks, which torch's own attention leaves out.
    *("gemma2", "gpt_oss", "vaultgemma"),
]
MATERIALISED = [
    *("bloom", "falcon", "mpt", "deepseek_v2", "deepseek_v3", "llama4_text"),
    *("gptj", "gpt_neo", "codegen", "xglm", "doge"),
]
# In transformers 4 their attention computes with K, or is called past the interface that we replace,
LATER_PAGED = {"nemotron", "olmoe", "phimoe", "qwen2_moe", "stablelm"}
# or goes by masks of its own making.
LATER_PAGED |= {"granitemoe", "opt", "persimmon"}
# What transformers 4 has another cache for, or none that works.
LATER = {"lfm2", "xglm", "deepseek_v3", "gemma3n_text", "doge"}
IS_4 = transformers.__version__.startswith("4.")
# Up to 5.18 its layers that share K and V hand over tensors of their own making.
INSTALLED = Version(transformers.__version__)
SHARES_LATER = "gemma3n_text" if Version("5.18") >= INSTALLED else ""
# Since 5.24 they attend through the interface.
NOW_PAGED = {"codegen", "gptj"} if Version("5.24") <= INSTALLED else set[str]()


@pytest.mark.parametrize(
    ("family", "route"),
    [(name, Route.PAGED) for name in PAGED] + [(name, Route.MATERIALISED) for name in MATERIALISED],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of the models themselves
def test_the_family_is_served_on_its_route(family: str, route: Route) -> None:
    if IS_4 and (family in LATER or family not in family_names()):
        pytest.skip("not in transformers 4 as it is now")
    logging.set_verbosity_error()
    with torch.no_grad():
        found = examine(family)
    assert "route" in found, found
    if family in NOW_PAGED:
        route = Route.PAGED
    if family != SHARES_LATER and (not IS_4 or (route is Route.PAGED and family not in LATER_PAGED)):
        assert found["route"] == route
    assert found["equal"]
    assert found["difference"] < ALLOWED


@pytest.mark.parametrize("route", list(Route))
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 40])
def test_windows_of_any_size_are_the_models_own(window: int, route: Route) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=window,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids, cut = prompt(60), 33
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    cache = KVCache.for_model(model, KVCacheConfig(max_tokens=512, block_size=16))
    with Attachment(model, cache, route, "test").install(), torch.no_grad():
        session = cache.session("window")
        done = 0
        for width in (cut, 1, 1, 20, 5):
            found = model(ids[:, done : done + width], **over(session)).logits
            assert torch.allclose(found, expected[:, done : done + width], atol=1e-5)
            done += width
        session.close()


def test_each_layer_has_its_own_window() -> None:
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = prompt(50)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with kvhybrid.attach(model, config=KVCacheConfig(max_tokens=512, block_size=16)) as attachment:
            assert attachment.route is Route.PAGED
            session = attachment.cache.session("windows")
            found = [model(ids[:, at : at + 10], **over(session)).logits for at in range(0, 50, 10)]
            session.close()
    assert torch.allclose(torch.cat(found, dim=1), expected, atol=1e-4)


@pytest.mark.skipif(IS_4, reason="they came with transformers 5")
@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
def test_layers_that_differ_are_packed_in_the_engine_too(family: str) -> None:
    if family == SHARES_LATER:
        pytest.skip("its layers are of one shape in this version")
    model = small_model(family)
    layout = KVCache.for_model(model, KVCacheConfig(max_tokens=64, block_size=16)).layout
    assert layout.shapes
    assert choose_packing(model, layout)[0] is Packing.RAGGED


def test_weights_that_are_offloaded_do_not_say_where_k_and_v_lie() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(make_model("llama"), execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    ids = prompt(40)
    expected = make_model("llama").generate(ids, max_new_tokens=6, do_sample=False)
    with kvhybrid.attach(model, config=KVCacheConfig(max_tokens=512, block_size=16)) as attachment:
        assert attachment.cache.storage.device.type == "cpu"
        for _ in range(2):
            assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), expected)
        assert attachment.cache.get_stats()["cached_tokens"] >= 32
