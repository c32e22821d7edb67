"""One session's live states: taken, put back, reordered and taken back, against the model's own runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from families import prompt
from hybrids import CONFIGS, known, make_hybrid
from transformers import cache_utils
from transformers.cache_utils import DynamicCache

from kvhybrid.errors import UnsupportedError
from kvhybrid.model.layer_states import LayerStates, name_layers, state_layers
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from transformers import PreTrainedModel

if not hasattr(cache_utils, "LinearAttentionCacheLayerMixin"):
    pytest.skip("this transformers has no states that can be taken out", allow_module_level=True)

FAMILIES = known()


def run(model: PreTrainedModel, cache: DynamicCache, ids: torch.Tensor) -> torch.Tensor:
    done = cache.get_seq_length()
    positions = torch.arange(done, done + ids.shape[1])[None].expand(len(ids), -1)
    with torch.no_grad():
        output = model(input_ids=ids, position_ids=positions, **over(cache), use_cache=True)
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def begin(model: PreTrainedModel) -> tuple[DynamicCache, LayerStates]:
    cache = DynamicCache(config=model.config)
    live = LayerStates(state_layers(model.config))
    live.show_in(cache.layers)
    return cache, live


def keep_attention(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    return [
        (layer.keys.clone(), layer.values.clone()) if getattr(layer, "keys", None) is not None else None
        for layer in cache.layers
    ]


def put_attention(cache: DynamicCache, held: list[tuple[torch.Tensor, torch.Tensor] | None]) -> None:
    for layer, pair in zip(cache.layers, held, strict=True):
        if pair is not None:
            layer.update(*pair)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_goes_on_from_a_state_that_was_put_back(family: str) -> None:
    model = make_hybrid(family)
    cache, live = begin(model)
    ids = torch.cat([prompt(13, seed=1), prompt(13, seed=2)])
    run(model, cache, ids[:, :9])
    states, held = [live.take(row) for row in (0, 1)], keep_attention(cache)
    expected = [run(model, cache, ids[:, at : at + 1]) for at in range(9, 13)]

    other, live = begin(model)
    live.restore(states)
    put_attention(other, held)
    found = [run(model, other, ids[:, at : at + 1]) for at in range(9, 13)]
    assert torch.equal(torch.stack(found), torch.stack(expected))


@pytest.mark.parametrize("family", ["lfm2", "qwen3-next"])
def test_rows_keep_their_states_in_whatever_order(family: str) -> None:
    model = make_hybrid(family)
    cache, live = begin(model)
    run(model, cache, torch.cat([prompt(9, seed=1), prompt(9, seed=2)]))
    before = [live.take(0), live.take(1)]
    live.select([1, 0, 1])
    for row, old in enumerate((1, 0, 1)):
        for part, was in zip(live.take(row), before[old], strict=True):
            assert (part is None) == (was is None)
            assert part is None or was is None or torch.equal(part, was)


def test_a_taken_state_does_not_change_with_the_text() -> None:
    model = make_hybrid("qwen3-next")
    cache, live = begin(model)
    run(model, cache, prompt(9))
    taken = live.take(0)
    before = [part.clone() for part in taken if part is not None]
    run(model, cache, prompt(1, seed=3))
    assert all(
        torch.equal(part, was)
        for part, was in zip([part for part in taken if part is not None], before, strict=True)
    )


def test_recorded_convolutions_are_taken_back_and_others_are_not() -> None:
    model = make_hybrid("lfm2")
    ids = prompt(20)
    cache, live = begin(model)
    live.record()
    run(model, cache, ids[:, :2])  # shorter than the convolution
    assert not live.crop(3, 2)
    assert live.crop(1, 2)
    for layer in cache.layers:
        if hasattr(layer, "keys") and layer.keys is not None:
            layer.crop(-1)
    run(model, cache, ids[:, 1:15])
    assert live.crop(4, 15)
    for layer in cache.layers:
        if hasattr(layer, "keys") and layer.keys is not None:
            layer.crop(-4)
    found = run(model, cache, ids[:, 11:20])
    own = DynamicCache(config=model.config)
    assert torch.allclose(found, run(model, own, ids), atol=1e-5)
    assert all(not layer.record_past for layer in LayerStates(state_layers(model.config)))

    for family in ("lfm2", "qwen3-next"):  # not recorded; recurrent
        model = make_hybrid(family)
        cache, live = begin(model)
        if family == "qwen3-next":
            live.record()
        run(model, cache, ids)
        assert not live.crop(1, 20)


def test_a_recorded_state_is_taken_in_its_usual_width() -> None:
    model = make_hybrid("lfm2")
    taken = []
    for records in (False, True):
        for length in (1, 2, 9):
            cache, live = begin(model)
            if records:
                live.record()
            run(model, cache, prompt(length))
            taken.append(live.take(0))
    for plain, recorded in zip(taken[:3], taken[3:], strict=True):
        for part, other in zip(plain, recorded, strict=True):
            assert part is None or (other is not None and torch.allclose(part, other))


def test_states_of_one_mode_serve_the_other() -> None:
    model = make_hybrid("lfm2")
    cache, live = begin(model)
    ids = prompt(12)
    with torch.inference_mode():
        model(input_ids=ids[:, :6], **over(cache), use_cache=True)
    for layer in cache.layers:
        if getattr(layer, "keys", None) is not None:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
    live.settle()
    model(input_ids=ids[:, 6:7], **over(cache), use_cache=True)  # with gradients, too
    live.settle()
    assert not any(
        part.requires_grad or part.is_inference() for layer in live for part in layer.conv_states.values()
    )


def test_layers_are_named_by_number_and_kind() -> None:
    model = make_hybrid("lfm2")
    assert name_layers(model.config, state_layers(model.config)) == "layers 0, 2 (conv)"
    assert name_layers(model.config, [1]) == "layer 1 (full_attention)"


def test_a_layer_class_that_is_not_known_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Another(cache_utils.LinearAttentionLayer):
        """It might keep more than we take out."""

    monkeypatch.setitem(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "conv", Another)
    with pytest.raises(UnsupportedError, match=r"layer 0 \(conv\) keeps a Another"):
        state_layers(make_hybrid("lfm2").config)


def test_every_family_here_has_both_kinds_of_layers() -> None:
    for family in FAMILIES:
        config = make_hybrid(family).config
        layers = DynamicCache(config=config).layers
        attends = [isinstance(layer, cache_utils.CacheLayerMixin) for layer in layers]
        assert any(attends), family
        assert state_layers(config), family
    assert set(FAMILIES) <= set(CONFIGS)
