"""Numbers that pages of a narrower dtype cannot hold: never another text, and an error that says so."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from families import make_model, prompt

import kvhybrid
from kvhybrid import KVCacheConfig, KVEngine, UnsupportedError
from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.model.attach import Attachment
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from transformers import PreTrainedModel

IDS = prompt(40)


def huge(which: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model that computes the same over K, or V, beyond what float16 holds."""
    model = make_model("llama").to(dtype)
    layer = model.model.layers[1].self_attn
    up, down = (layer.k_proj, layer.q_proj) if which == "K" else (layer.v_proj, layer.o_proj)
    with torch.no_grad():
        up.weight.mul_(2.0**22)
        down.weight.mul_(2.0**-22)
    return model


def text_of(model: PreTrainedModel, **more: object) -> torch.Tensor:
    found: torch.Tensor = model.generate(IDS, max_new_tokens=6, do_sample=False, **more)
    return found


@pytest.mark.parametrize("which", ["K", "V"])
@pytest.mark.parametrize("route", Route)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_pages_cannot_hold_is_the_models_own_text_or_an_error(
    which: str, route: Route, dtype: torch.dtype
) -> None:
    expected = text_of(huge(which, dtype))
    model = huge(which, dtype)
    config = KVCacheConfig(max_tokens=1024, block_size=16, dtype="float16")
    attachment = Attachment(model, KVCache.for_model(model, config), route, "test").install()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            assert torch.equal(text_of(model), expected)
    assert attachment.cache.get_stats()["passed_by_calls"] == 2
    with pytest.raises(UnsupportedError, match=f"layer 1: {which} holds numbers beyond 65504"):
        text_of(model, **over(attachment.cache.session("a")))
    pool = attachment.cache.pool
    attachment.cache.drop_session("a")
    assert pool.num_free + pool.num_evictable == pool.num_pages
    attachment.detach()


@pytest.mark.parametrize("which", ["K", "V"])
def test_whoever_runs_the_model_to_see_says_so_beforehand(which: str) -> None:
    config = KVCacheConfig(max_tokens=1024, block_size=16, dtype="float16")
    with pytest.raises(UnsupportedError, match="beyond 65504"):
        kvhybrid.attach(huge(which), config=config)
    with pytest.raises(UnsupportedError, match="beyond 65504"):
        KVEngine(huge(which), config)


@pytest.mark.parametrize("pages", ["float32", "bfloat16"])
@pytest.mark.parametrize("which", ["K", "V"])
def test_pages_with_room_for_them_serve_such_models(which: str, pages: str) -> None:
    expected = text_of(huge(which))
    model = huge(which)
    with kvhybrid.attach(
        model, config=KVCacheConfig(max_tokens=1024, block_size=16, dtype=pages)
    ) as attachment:
        for _ in range(2):
            assert torch.equal(text_of(model), expected)
        assert attachment.cache.get_stats()["passed_by_calls"] == 0
