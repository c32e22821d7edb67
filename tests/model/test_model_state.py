"""A model has another name once it computes something else, however that was done."""

from __future__ import annotations

import functools
import threading
import types
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pytest
import torch
from families import make_model

import kvhybrid
from kvhybrid import KVCacheConfig
from kvhybrid.model import weights
from kvhybrid.model.watch import far_weights, samples, weight_watch
from kvhybrid.model.weights import ModelState

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    Change = Callable[[PreTrainedModel], None]


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


def swap_a_class(model: PreTrainedModel) -> None:
    mlp = model.model.layers[0].mlp
    mlp.__class__ = type("Louder", (type(mlp),), {"forward": lambda self, x: 2 * x})


def replace_forward_on_an_object(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.forward = torch.neg


def replace_forward_by_a_bound_method(model: PreTrainedModel) -> None:
    mlp = model.model.layers[1].mlp
    mlp.forward = types.MethodType(lambda self, x: x, mlp)


def replace_forward_by_a_partial(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.forward = functools.partial(torch.mul, other=2)


def change_a_number(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.scaling *= 3


def change_a_flag(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.is_causal = False


def add_an_attribute(model: PreTrainedModel) -> None:
    model.model.layers[0].control = torch.ones(3)


def change_a_setting_that_layers_share(model: PreTrainedModel) -> None:
    model.config.rms_norm_eps = 1.0


def train_one_module(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.train()


def write_into_a_nested_list(model: PreTrainedModel) -> None:
    model.model.steps["here"][0].append(4)


def write_into_a_nested_set(model: PreTrainedModel) -> None:
    model.model.steps["there"].add(7)


def write_into_a_nested_object(model: PreTrainedModel) -> None:
    model.model.steps["object"].strength = 2.0


def write_into_a_tensor_that_is_an_attribute(model: PreTrainedModel) -> None:
    model.model.steps["vector"].data[1] = 5


def write_a_small_tensor_of_whole_numbers(model: PreTrainedModel) -> None:
    model.model.steps["index"].data[2] = 9


CHANGES = [
    swap_a_class,
    replace_forward_on_an_object,
    replace_forward_by_a_bound_method,
    replace_forward_by_a_partial,
    change_a_number,
    change_a_flag,
    add_an_attribute,
    change_a_setting_that_layers_share,
    train_one_module,
    write_into_a_nested_list,
    write_into_a_nested_set,
    write_into_a_nested_object,
    write_into_a_tensor_that_is_an_attribute,
    write_a_small_tensor_of_whole_numbers,
    put_a_parameter_past_setattr,
    put_a_module_past_setattr,
    change_the_order_of_modules,
    add_a_buffer,
    remove_a_parameter,
    add_a_hook,
    put_other_hooks_in_place_of_all,
    write_in_place,
    write_where_nobody_counts,
    point_to_other_data,
    cut_the_end_off_a_weight,
    read_a_weight_as_another_dtype,
    take_over_the_data_of_an_inference_tensor,
    turn_a_square_weight,
    free_the_memory_of_a_weight,
]


def model_with_attributes() -> PreTrainedModel:
    """A model with plain attributes of many kinds beside its own."""
    model = make_model("llama")
    model.model.steps = {
        "here": ([1, 2], "text"),
        "there": {3, 4},
        "object": types.SimpleNamespace(strength=1.0),
        "vector": torch.zeros(5),
        "index": torch.arange(4),
    }
    return model


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_gives_the_model_another_name(change: Change) -> None:
    model = model_with_attributes()
    state = ModelState(model)
    before = state.look()
    assert state.look() == before
    change(model)
    after = state.look()
    assert after != before
    assert state.look() == after


def test_a_module_with_other_dictionaries_is_watched_in_those() -> None:
    model = make_model("llama")
    state, norm = ModelState(model), model.model.norm
    norm.__dict__ = {**norm.__dict__, "_parameters": dict(norm._parameters)}
    before = state.look()
    norm._parameters["weight"] = torch.nn.Parameter(norm.weight.detach() * 2)
    assert state.look() != before


def test_what_is_put_back_has_its_name_again() -> None:
    model = make_model("llama")
    state, layer = ModelState(model), model.model.layers[0]
    before = state.look()
    undo = layer.register_forward_hook(lambda *_: None).remove
    scaling, layer.self_attn.scaling = layer.self_attn.scaling, 7.0
    forward, layer.mlp.forward = layer.mlp.forward, torch.neg
    layer.control = torch.ones(2)
    state.look()
    undo()
    layer.self_attn.scaling = scaling
    layer.mlp.forward = forward
    del layer.control
    after = state.look()
    assert after is not None
    assert before is not None
    assert after.facts == before.facts


def test_methods_replaced_on_a_class_and_functions_of_its_file_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    state, attention = ModelState(model), type(model.model.layers[0].self_attn)
    names = {state.look()}
    file = weights.sys.modules[attention.__module__]
    monkeypatch.setattr(file, "rotate_half", torch.neg)  # reached from another function of the file
    names.add(state.look())
    monkeypatch.setattr(attention, "forward", lambda *_, **__: None)
    names.add(state.look())
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: x)
    names.add(state.look())
    assert len(names) == 4


def test_what_changed_and_came_back_is_told_from_what_never_changed() -> None:
    model = make_model("llama")
    state = ModelState(model)
    before = state.look()
    assert before is not None
    same = state.look()
    assert same is not None
    assert same.is_unchanged_since(before)
    with model.model.layers[0].register_forward_pre_hook(lambda *_: None):
        state.look()
    back = state.look()
    assert back is not None
    assert back == before
    assert not back != before  # noqa: SIM202  # both are asked for
    assert not back.is_unchanged_since(before)


def test_hooks_of_every_module_of_the_process_count() -> None:
    state = ModelState(make_model("llama"))
    before = state.look()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert state.look() != before
    handle.remove()
    assert state.look() == before


@pytest.mark.parametrize("kind", ["autocast", "precision"])
def test_the_precision_of_the_calling_thread_counts(kind: str) -> None:
    state = ModelState(make_model("llama"))
    before = state.look()
    if kind == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            assert state.look() != before
    else:
        torch.set_float32_matmul_precision("medium")
        try:
            assert state.look() != before
        finally:
            torch.set_float32_matmul_precision("highest")
    assert state.look() == before


def test_a_forward_pass_changes_no_name() -> None:
    model = make_model("llama")
    state = ModelState(model)
    before = state.look()
    model(torch.arange(5)[None])
    model.generate(torch.arange(5)[None], max_new_tokens=3, do_sample=False)
    assert state.look() == before


def test_attributes_that_the_model_writes_itself_are_learned_and_left_out() -> None:
    model = make_model("llama")

    def counts(module: Any, *_: object) -> None:
        module.calls = getattr(module, "calls", 0) + 1
        module.last = {"length": module.calls}

    model.model.layers[0].register_forward_pre_hook(counts)
    state = ModelState(model)
    for length in (5, 4):
        with state.learning():
            model(torch.arange(length)[None])
    before = state.look()
    model(torch.arange(6)[None])
    assert state.look() == before
    model.model.layers[0].other = 3
    assert state.look() != before


def test_nothing_is_walked_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    state = ModelState(model)
    walks: list[object] = []
    scan = weights.ModuleScan
    monkeypatch.setattr(weights, "ModuleScan", lambda of, **kw: walks.append(of) or scan(of, **kw))
    before = state.look()
    state.survey()
    assert walks == []
    add_a_hook(model)
    after = state.look()
    assert after != before
    assert state.look() == after
    assert len(walks) == 1


def test_a_weight_that_holds_no_number_has_not_changed_for_that() -> None:
    model = make_model("llama")
    model.lm_head.weight.data[0, 0] = torch.nan
    state = ModelState(model)
    assert state.look() == state.look()


def test_weights_that_come_when_they_are_needed_keep_their_name() -> None:
    model = make_model("llama")
    model.model.norm.weight = torch.nn.Parameter(torch.empty(3, device="meta"))
    state = ModelState(model)
    before = state.look()
    model.model.norm.weight = torch.nn.Parameter(torch.empty(3, device="meta"))
    assert state.look() == before


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

    def __tensor_flatten__(self):
        return ["inner"], None


def test_a_write_into_what_a_wrapping_weight_is_made_of_counts() -> None:
    model = make_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(Wrapped(layer.weight.detach().clone()), requires_grad=False)
    state = ModelState(model)
    before = state.look()
    assert state.look() == before
    layer.weight.inner.mul_(2)
    assert state.look() != before


def test_a_model_with_wrapping_weights_is_served() -> None:
    model = make_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(Wrapped(layer.weight.detach().clone()), requires_grad=False)
    ids = torch.arange(1, 21)[None]
    with kvhybrid.attach(model, config=KVCacheConfig(max_tokens=256, block_size=16)) as attachment:
        found = model.generate(ids, max_new_tokens=4, do_sample=False)
        assert torch.equal(found, model.generate(ids, max_new_tokens=4, do_sample=False))
        assert attachment.cache.get_stats()["cached_tokens"] == 19


@pytest.mark.parametrize("left", [0, 64])
def test_weights_whose_memory_is_freed_or_cut_are_not_read(left: int) -> None:
    model = make_model("llama")
    state = ModelState(model)
    before = state.look()
    model.lm_head.weight.untyped_storage().resize_(left)
    after = state.look()
    assert after != before
    assert state.look() == after


def test_memory_that_another_thread_frees_again_and_again_ends_no_process() -> None:
    model = make_model("llama")
    big = torch.nn.Parameter(torch.randn(1024, 1024), requires_grad=False)
    model.model.layers[0].extra = big
    state, storage = ModelState(model), big.untyped_storage()
    size, is_over = storage.nbytes(), threading.Event()

    def free() -> None:
        while not is_over.is_set():
            storage.resize_(0)
            storage.resize_(size)

    thread = threading.Thread(target=free)
    thread.start()
    try:
        for _ in range(300):
            state.look()
    finally:
        is_over.set()
        thread.join()


def test_compiled_modules_are_described_without_their_attributes() -> None:
    script = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(8, 8)))
    scan = weights.ModuleScan(script, changing=weights.Changing(), held={})
    assert not scan.is_exact
    assert len(scan.tensors) == 2


SHAPES = [(3,), (7, 5), (64, 64), (129, 33), (8, 4096), (2, 3, 5, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.int8])
@pytest.mark.parametrize("how", ["plain", "transposed", "sliced"])
def test_samples_are_spread_and_lie_within_the_tensor(
    shape: tuple[int, ...], dtype: torch.dtype, how: str
) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    if how == "transposed":
        tensor = tensor.transpose(0, -1)
    elif how == "sliced":
        tensor = torch.randint(0, 2, (2 * shape[0], *shape[1:])).to(dtype)[::2]
    places = samples.spread(tensor)
    indices = np.unravel_index(places.numpy(), tensor.shape)
    assert len(places) == min(tensor.numel(), samples.SAMPLES)
    for axis, size in enumerate(tensor.shape):
        assert len(set(indices[axis].tolist())) > min(size, 3) // 2  # more than one row, more than one column
    watch = weight_watch.WeightWatch([tensor])
    for place in places.tolist():
        one = tuple(int(each) for each in np.unravel_index(place, tensor.shape))
        old = tensor[one].clone()
        tensor.data[one] = 1 - old.to(torch.int64)
        assert not watch.is_same()
        tensor.data[one] = old
        assert watch.is_same()


@pytest.mark.parametrize("how", ["plain", "transposed", "sliced", "columns"])
def test_a_write_to_any_number_is_seen_within_one_round(how: str) -> None:
    whole = torch.zeros(300, 500)
    tensor = {"plain": whole, "transposed": whole.t(), "sliced": whole[::3], "columns": whole[:, 7:400]}[how]
    for place in (1, tensor.numel() // 2 + 3, tensor.numel() - 2):
        watch = weight_watch.WeightWatch([tensor])
        one = tuple(int(each) for each in np.unravel_index(place, tensor.shape))
        tensor.data[one] += 1
        assert not all(watch.is_same() for _ in range(watch.num_blocks + 1))


def test_what_lies_between_the_numbers_of_a_tensor_is_not_its_own() -> None:
    whole = torch.zeros(300, 500)
    watch = weight_watch.WeightWatch([whole[:, 7:400]])
    whole.data[:, :7] += 1
    whole.data[:, 400:] += 1
    assert all(watch.is_same() for _ in range(watch.num_blocks + 1))


def test_two_values_that_change_places_are_seen() -> None:
    tensor = torch.arange(100000, dtype=torch.float32)
    watch = weight_watch.WeightWatch([tensor])
    tensor.data[[11, 12]] = tensor.data[[12, 11]].clone()
    assert not all(watch.is_same() for _ in range(watch.num_blocks))


def test_the_sums_of_other_devices_see_every_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    for tensor in (torch.randn(70000), torch.randn(300, 400).t(), torch.randn(90, 1000)[::2]):
        far = far_weights.FarWeights([tensor])
        everything = range(len(far.blocks))
        assert far.has_same_samples()
        assert far.has_same_blocks(everything)
        flat = tuple(int(each) for each in np.unravel_index(tensor.numel() // 3 + 1, tensor.shape))
        tensor.data[flat] += 0.5
        assert not far.has_same_blocks(everything)


def test_rows_of_a_prompts_tokens_are_seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_watch.WeightWatch, "_has_same_blocks", lambda _: True)
    model = make_model("llama")
    weight = model.get_input_embeddings().weight
    state = ModelState(model)
    tokens = np.array([3, 9, 11, 9], np.int64)
    before = state.look(tokens)
    weight.data[11] += 0.25
    assert state.look(tokens[:2]) == before
    assert state.look(tokens) != before


def train_rows(model: PreTrainedModel, row: int, **options: bool) -> None:
    """Step an optimizer that writes one row of one weight."""
    weight = model.model.layers[0].self_attn.v_proj.weight
    optimizer = torch.optim.AdamW([weight], lr=3.0, weight_decay=0.0, **options)
    weight.grad = torch.zeros_like(weight)
    weight.grad[row] = 1
    optimizer.step()
    weight.grad = None


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_an_optimizers_step_over_one_row_is_seen_at_once(options: dict[str, bool]) -> None:
    model = make_model("llama")
    state, other = ModelState(model), ModelState(make_model("llama"))
    before, others = state.look(), other.look()
    train_rows(model, 5, **options)
    assert state.look() != before
    assert other.look() == others


def test_a_look_within_a_look_of_the_same_thread_names_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ModelState(make_model("llama"))
    found: list[object] = []
    watch = state._watch
    is_same = watch.is_same
    monkeypatch.setattr(watch, "is_same", lambda: found.append(state.look()) or is_same())
    assert state.look() is not None
    assert found == [None]


def test_threads_that_look_at_once_agree() -> None:
    model = make_model("llama")
    state = ModelState(model)
    start = threading.Barrier(4)
    for round_number in range(20):
        with torch.no_grad():
            model.lm_head.weight.fill_(round_number)
        found: list[object] = [None] * 4

        def ask(index: int, found: list[object] = found) -> None:
            start.wait()
            found[index] = state.look()

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(set(found)) == 1


def test_users_of_one_model_share_its_state_until_the_last_is_gone() -> None:
    model = make_model("llama")
    first, second = ModelState.of(model), ModelState.of(model)
    assert first is second
    name = first.look()
    first.leave()
    assert ModelState.of(model) is first
    first.leave()
    first.leave()
    third = ModelState.of(model)
    assert third is not first
    assert third.look() == name  # nothing has changed in between
    third.leave()
    model.lm_head.weight.data[1, 1] += 1
    assert ModelState.of(model).look() != name
