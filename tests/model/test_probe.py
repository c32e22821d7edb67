"""The probe's decisions, and the models whose own logits are no measure."""

from __future__ import annotations

import inspect
import logging
from types import SimpleNamespace

import pytest
import torch
from families import make_model

import kvhybrid
from kvhybrid import KVCache, KVCacheConfig, LayoutError, UnsupportedError
from kvhybrid.cache.measured import measure_layers
from kvhybrid.layout import KVLayout
from kvhybrid.model import probe
from kvhybrid.model.packing import choose_packing
from kvhybrid.model.probe import STEPS, choose_route, try_routes
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import CACHE, over


def layout_of(model: torch.nn.Module) -> KVLayout:
    return KVCache.for_model(model, KVCacheConfig(max_tokens=64, block_size=16)).layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_route_is_chosen_by_what_was_measured(dtype: torch.dtype) -> None:
    model = make_model("mistral-window", dtype=dtype)
    (trial,) = try_routes(model, layout_of(model))
    assert trial.route is Route.PAGED
    assert trial.problem is None
    assert trial.difference is not None
    assert 0 <= trial.difference <= trial.allowed


def test_small_windows_end_inside_the_probes_text() -> None:
    assert sum(STEPS) > 24
    assert STEPS[0] > 16


def test_another_attention_implementation_is_materialised() -> None:
    model = make_model("llama")
    model.set_attn_implementation("eager")
    trials = try_routes(model, layout_of(model))
    assert [trial.route for trial in trials] == list(Route)
    assert trials[0].difference is None
    assert choose_route(model, layout_of(model)) == (
        Route.MATERIALISED,
        "its attention implementation is 'eager', the paged route replaces 'sdpa'",
    )


@pytest.mark.parametrize("choose", [choose_route, choose_packing])
def test_a_model_whose_own_cache_changes_its_text_is_refused(choose, monkeypatch) -> None:
    model = make_model("llama")
    layout, forward = layout_of(model), model.forward

    def confused(**kwargs):
        output = forward(**kwargs)
        if kwargs.get(CACHE) is not None and kwargs["input_ids"].shape[1] == 1:
            output.logits = output.logits * 2 + 1
        return output

    confused.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(model, "forward", confused)
    with pytest.raises(UnsupportedError, match=r"its own cache than without one: they differ by \d"):
        choose(model, layout)


@pytest.mark.parametrize("choose", [choose_route, choose_packing])
def test_a_model_that_cannot_go_on_from_a_cache_is_refused_with_its_reason(choose, monkeypatch) -> None:
    model = make_model("llama")
    layout, forward = layout_of(model), model.forward

    def fail(**kwargs):
        if kwargs.get(CACHE) is not None and kwargs[CACHE].get_seq_length():
            raise AssertionError("one text, one pass")
        return forward(**kwargs)

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(UnsupportedError, match=r"step by step .*: AssertionError: one text, one pass"):
        choose(model, layout)


def test_a_cache_laid_out_for_other_layers_is_refused() -> None:
    model = make_model("llama")
    for change in ({"num_layers": 2}, {"num_kv_heads": 3}):
        layout = KVLayout(**{"num_layers": 3, "num_kv_heads": 2, "head_dim": 8, "block_size": 16, **change})
        with pytest.raises((LayoutError, UnsupportedError), match=r"layout (has 2|says 3)"):
            kvhybrid.attach(model, KVCache(KVCacheConfig(max_tokens=512, block_size=16), layout=layout))


def test_a_layer_on_another_device_has_its_pages_there(monkeypatch) -> None:
    model = make_model("llama")
    past = model(torch.arange(3)[None], use_cache=True)[CACHE]
    last = past.layers[-1]
    last.keys, last.values = last.keys.to("meta"), last.values.to("meta")
    output = SimpleNamespace(**over(past))
    monkeypatch.setattr(model, "forward", lambda **kwargs: output)
    assert [device.type for device in measure_layers(model).devices] == ["cpu", "cpu", "meta"]
    storage = KVCache.for_model(model, KVCacheConfig(max_tokens=64, block_size=16)).storage
    assert [pages.device.type for pages in storage.keys] == ["cpu", "cpu", "meta"]


def test_a_model_that_says_something_else_without_a_mask_is_refused(monkeypatch) -> None:
    model = make_model("llama")
    layout, forward = layout_of(model), model.forward

    def unmasked(**kwargs):
        output = forward(**kwargs)
        if kwargs.get("attention_mask") is None:
            output.logits = output.logits + torch.randn_like(output.logits)
        return output

    monkeypatch.setattr(model, "forward", unmasked)
    with pytest.raises(UnsupportedError, match=r"for a text alone than beside a padded one: .* \d"):
        choose_route(model, layout)


def test_a_model_whose_generate_writes_another_text_over_us_is_refused(monkeypatch) -> None:
    model = make_model("llama")
    texts = iter([torch.tensor([[5]]), torch.tensor([[6]]), torch.tensor([[6]])])
    monkeypatch.setattr(probe, "written_by", lambda *_: next(texts))
    with pytest.raises(UnsupportedError, match=r"paged: generate writes another.*materialised: generate"):
        choose_route(model, layout_of(model))


def test_a_model_that_cannot_generate_is_judged_by_its_logits(monkeypatch) -> None:
    model = make_model("llama")

    def fail(*args, **kwargs):
        raise AttributeError("generate")

    monkeypatch.setattr(model, "generate", fail)
    assert choose_route(model, layout_of(model))[0] is Route.PAGED


def test_parts_that_are_frozen_in_evaluation_mode_stay_so() -> None:
    model = make_model("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    layout = KVCache.for_model(model, KVCacheConfig(max_tokens=64)).layout
    assert [module.training for module in model.modules()] == before
    choose_route(model, layout)
    choose_packing(model, layout)
    assert [module.training for module in model.modules()] == before


def test_a_model_that_samples_by_itself_is_probed_greedily_and_nothing_is_logged(monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning_once", lambda _, message, *args: said.append(message))
    model = make_model("llama")
    model.generation_config.update(do_sample=True, temperature=0.8, top_p=0.9, top_k=20)
    assert (
        choose_route(model, KVCache.for_model(model, KVCacheConfig(max_tokens=64)).layout)[0] is Route.PAGED
    )
    assert said == []
