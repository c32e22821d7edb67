"""A snapshot never says that nothing has changed when something has, however it was done."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Self

import pytest
import torch
from families import make_model

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.model import snapshot, weights
from kvhybrid.model.snapshot import Snapshot
from kvhybrid.model.weights import ModelState

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel


def put_a_parameter_past_setattr(model: PreTrainedModel) -> None:
    layer = model.model.layers[0].self_attn.k_proj
    layer._parameters["weight"] = torch.nn.Parameter(layer.weight.detach().clone())


def put_a_module_past_setattr(model: PreTrainedModel) -> None:
    layer = model.model.layers[0]
    layer._modules["mlp"] = model.model.layers[1].mlp


def change_the_order_of_modules(model: PreTrainedModel) -> None:
    layers = model.model.layers._modules
    layers["0"], layers["1"] = layers["1"], layers["0"]


def add_a_buffer(model: PreTrainedModel) -> None:
    model.model.norm.register_buffer("shift", torch.zeros(3))


def remove_a_parameter(model: PreTrainedModel) -> None:
    del model.model.norm.weight


def add_a_hook(model: PreTrainedModel) -> None:
    model.model.layers[1].register_forward_pre_hook(lambda *_: None)


def put_other_hooks_in_place_of_all(model: PreTrainedModel) -> None:
    model.model.norm._forward_hooks = OrderedDict({0: print})


def give_a_module_other_attributes(model: PreTrainedModel) -> None:
    norm = model.model.norm
    norm.__dict__ = {**norm.__dict__, "_parameters": dict(norm._parameters)}


def write_in_place(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.lm_head.weight[3, 1] += 1  # no sample lies there


def write_where_nobody_counts(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.v_proj.weight.data.mul_(2)


def point_to_other_data(model: PreTrainedModel) -> None:
    weight = model.model.layers[1].self_attn.v_proj.weight
    weight.data = weight.data.clone()


def cut_the_end_off_a_weight(model: PreTrainedModel) -> None:
    weight = model.lm_head.weight
    weight.data = weight.data[:-1]


def read_a_weight_as_another_dtype(model: PreTrainedModel) -> None:
    weight = model.model.norm.weight
    weight.data = weight.data.view(torch.int32).view(torch.float32).view(torch.bfloat16)[::2]


def take_over_the_data_of_an_inference_tensor(model: PreTrainedModel) -> None:
    weight = model.model.norm.weight
    with torch.inference_mode():
        other = weight.detach().clone()
    weight.data = other


def turn_a_square_weight(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.shape[0] == weight.shape[1]
    weight.data = weight.data.t()


def free_the_memory_of_a_weight(model: PreTrainedModel) -> None:
    model.lm_head.weight.untyped_storage().resize_(0)


CHANGES = [
    put_a_parameter_past_setattr,
    put_a_module_past_setattr,
    change_the_order_of_modules,
    add_a_buffer,
    remove_a_parameter,
    add_a_hook,
    put_other_hooks_in_place_of_all,
    give_a_module_other_attributes,
    write_in_place,
    write_where_nobody_counts,
    point_to_other_data,
    cut_the_end_off_a_weight,
    read_a_weight_as_another_dtype,
    take_over_the_data_of_an_inference_tensor,
    turn_a_square_weight,
    free_the_memory_of_a_weight,
]


def snapshot_of(model: PreTrainedModel) -> Snapshot:
    modules = weights._modules(model)
    found = Snapshot.of(modules, weights._weights(modules))
    assert found is not None
    return found


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_it_sees(change: Callable[[PreTrainedModel], None]) -> None:
    model = make_model("llama")
    taken = snapshot_of(model)
    assert taken.is_same()
    change(model)
    assert not taken.is_same()


def test_a_forward_pass_changes_nothing_that_it_sees() -> None:
    model = make_model("llama")
    taken = snapshot_of(model)
    model(torch.arange(5)[None])
    assert taken.has_same_modules()
    assert taken.is_same()


def test_nothing_is_walked_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    state = ModelState(model)
    walks: list[object] = []
    walk = weights._modules
    monkeypatch.setattr(weights, "_modules", lambda of: walks.append(of) or walk(of))
    assert not state.look()
    state.survey()
    assert walks == []
    add_a_hook(model)
    before = state.parts
    assert not state.look()  # the weights are the same
    assert len(walks) == 1
    assert state.parts != before
    assert not state.look()
    assert len(walks) == 1


def test_a_weight_that_holds_no_number_has_not_changed_for_that() -> None:
    model = make_model("llama")
    model.lm_head.weight.data[0, 0] = torch.nan
    state = ModelState(model)
    assert not state.look()


def test_there_is_none_of_weights_that_come_when_they_are_needed() -> None:
    model = make_model("llama")
    model.model.norm.weight = torch.nn.Parameter(torch.empty(3, device="meta"))
    modules = weights._modules(model)
    assert Snapshot.of(modules, weights._weights(modules)) is None
    assert not ModelState(model).look()


class Wrapped(torch.Tensor):
    """A weight that keeps its numbers in another tensor, as quantized and sharded ones do."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Self:
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner: torch.Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args = [arg.inner if isinstance(arg, Wrapped) else arg for arg in args]
        result = function(*args, **(kwargs or {}))
        return cls(result) if function is torch.ops.aten.detach.default else result


def test_weights_that_keep_their_numbers_elsewhere_are_walked_and_never_read() -> None:
    model = make_model("llama")
    expected = model(torch.arange(5)[None]).logits
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(Wrapped(layer.weight.detach().clone()), requires_grad=False)
    modules = weights._modules(model)
    assert Snapshot.of(modules, weights._weights(modules)) is None
    state = ModelState(model)
    assert not state.look()
    assert torch.equal(model(torch.arange(5)[None]).logits, expected)
    with kvhybrid.attach(model, config=KVCacheConfig(max_tokens=256, block_size=16)) as attachment:
        found = model.generate(torch.arange(1, 21)[None], max_new_tokens=4, do_sample=False)
        again = model.generate(torch.arange(1, 21)[None], max_new_tokens=4, do_sample=False)
        assert torch.equal(found, again)
        assert attachment.cache.get_stats()["cached_tokens"] == 19
    layer.weight = torch.nn.Parameter(Wrapped(layer.weight.inner * 2), requires_grad=False)
    assert state.look()


@pytest.mark.parametrize("left", [0, 64])
def test_weights_whose_memory_is_freed_or_cut_are_not_read(left: int) -> None:
    model = make_model("llama")
    state = ModelState(model)
    model.lm_head.weight.untyped_storage().resize_(left)
    assert state.look()
    assert not state.look()
    modules = weights._modules(model)
    assert Snapshot.of(modules, weights._weights(modules)) is None


def test_a_weight_that_gets_other_data_while_it_is_made_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    weight = model.lm_head.weight
    kept, other = weight.data, torch.zeros_like(weight)
    sampled = snapshot._samples

    def swapped(tensors):
        weight.data = kept
        return sampled(tensors)

    monkeypatch.setattr(snapshot, "_samples", swapped)
    weight.data = other
    modules = weights._modules(model)
    assert Snapshot.of(modules, weights._weights(modules)) is None


def test_there_is_none_of_compiled_modules() -> None:
    script = torch.jit.script(torch.nn.Linear(8, 8))
    assert Snapshot.of([script], list(script.parameters())) is None
