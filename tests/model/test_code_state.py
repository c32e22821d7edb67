"""What code reads beside its arguments names a model: around a function, in its file, on its class."""

from __future__ import annotations

import functools
import itertools
import types
from array import array
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from families import make_model
from torch.overrides import TorchFunctionMode

from kvhybrid.model.weights import ModelState

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    Change = Callable[[], None]

SCALE = 1.0
SETTINGS = {"alpha": 1.0}
TOOLS = types.ModuleType("tools_of_a_user")
TOOLS.ALPHA = 1.0  # type: ignore[attr-defined]


def set_scale(value: float) -> None:
    globals()["SCALE"] = value


def scaled(output: torch.Tensor) -> torch.Tensor:
    """Stands between a hook and the number that it reads."""
    return output * SCALE


class Slotted:
    __slots__ = ("__hidden", "alpha", "late")

    def __init__(self) -> None:
        self.alpha, self.__hidden = 1.0, 1.0

    def hide(self, value: float) -> None:
        self.__hidden = value

    def __call__(self, _: object, __: object, output: torch.Tensor) -> torch.Tensor:
        return output * self.alpha * self.__hidden * getattr(self, "late", 1.0)


def a_number_around_the_hook() -> tuple[Any, Change]:
    alpha = 1.0

    def change() -> None:
        nonlocal alpha
        alpha = 2.0

    return lambda module, given, output: output * alpha, change


def a_dictionary_around_the_hook() -> tuple[Any, Change]:
    state = {"alpha": 1.0}
    return lambda module, given, output: output * state["alpha"], lambda: state.update(alpha=2.0)


def a_list_around_the_hook() -> tuple[Any, Change]:
    state = [1.0]
    return lambda module, given, output: output * state[0], lambda: state.__setitem__(0, 2.0)


def a_tensor_around_the_hook() -> tuple[Any, Change]:
    state = torch.ones(48)
    return lambda module, given, output: output * state, lambda: state.data.mul_(2).sum()


def an_array_around_the_hook() -> tuple[Any, Change]:
    state = np.ones(48, np.float32)
    return lambda module, given, output: output * torch.from_numpy(state), lambda: state.fill(2)


def a_queue_around_the_hook() -> tuple[Any, Change]:
    state = deque([1.0])
    return lambda module, given, output: output * state[0], lambda: state.appendleft(2.0)


def bytes_around_the_hook() -> tuple[Any, Change]:
    state = array("d", [1.0])
    return lambda module, given, output: output * state[0], lambda: state.insert(0, 2.0)


def a_module_around_the_hook() -> tuple[Any, Change]:
    coder = torch.nn.Linear(48, 48)
    return lambda module, given, output: coder(output), lambda: coder.weight.data.mul_(2).sum()


def an_object_around_the_hook() -> tuple[Any, Change]:
    state = types.SimpleNamespace(alpha=1.0)
    return lambda module, given, output: output * state.alpha, lambda: setattr(state, "alpha", 2.0)


def a_variable_that_comes_later() -> tuple[Any, Change]:
    def change() -> None:
        nonlocal alpha
        alpha = 2.0

    def hook(module: object, given: object, output: torch.Tensor) -> torch.Tensor:
        try:
            return output * alpha
        except NameError:
            return output

    if not change:
        alpha = 1.0
    return hook, change


def a_function_around_the_hook() -> tuple[Any, Change]:
    state = {"alpha": 1.0}

    def scale(output: torch.Tensor) -> torch.Tensor:
        return output * state["alpha"]

    return lambda module, given, output: scale(output), lambda: state.update(alpha=2.0)


def a_default_of_the_hook() -> tuple[Any, Change]:
    def hook(module: object, given: object, output: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
        return output * alpha

    return hook, lambda: setattr(hook, "__defaults__", (2.0,))


def a_keyword_of_the_hook() -> tuple[Any, Change]:
    def hook(module: object, given: object, output: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
        return output * alpha

    return hook, lambda: hook.__kwdefaults__.update(alpha=2.0)  # type: ignore[union-attr]


def a_number_of_the_file() -> tuple[Any, Change]:
    return lambda module, given, output: output * SCALE, lambda: set_scale(2.0)


def a_number_that_another_function_of_the_file_reads() -> tuple[Any, Change]:
    return lambda module, given, output: scaled(output), lambda: set_scale(2.0)


def settings_of_the_file() -> tuple[Any, Change]:
    return lambda module, given, output: output * SETTINGS["alpha"], lambda: SETTINGS.update(alpha=2.0)


def a_number_of_another_file() -> tuple[Any, Change]:
    return lambda module, given, output: output * TOOLS.ALPHA, lambda: setattr(TOOLS, "ALPHA", 2.0)


def a_slot() -> tuple[Any, Change]:
    hook = Slotted()
    return hook, lambda: setattr(hook, "alpha", 2.0)


def a_private_slot() -> tuple[Any, Change]:
    hook = Slotted()
    return hook, lambda: hook.hide(2.0)


def a_slot_that_comes_later() -> tuple[Any, Change]:
    hook = Slotted()
    return hook, lambda: setattr(hook, "late", 2.0)


def a_part_of_a_partial() -> tuple[Any, Change]:
    state = {"alpha": 1.0}

    def hook(state: dict[str, float], module: object, given: object, output: torch.Tensor) -> torch.Tensor:
        return output * state["alpha"]

    return functools.partial(hook, state), lambda: state.update(alpha=2.0)


HOOKS = [
    a_number_around_the_hook,
    a_dictionary_around_the_hook,
    a_list_around_the_hook,
    a_tensor_around_the_hook,
    an_array_around_the_hook,
    a_queue_around_the_hook,
    bytes_around_the_hook,
    a_module_around_the_hook,
    an_object_around_the_hook,
    a_variable_that_comes_later,
    a_function_around_the_hook,
    a_default_of_the_hook,
    a_keyword_of_the_hook,
    a_number_of_the_file,
    a_number_that_another_function_of_the_file_reads,
    settings_of_the_file,
    a_number_of_another_file,
    a_slot,
    a_private_slot,
    a_slot_that_comes_later,
    a_part_of_a_partial,
]


@pytest.fixture(autouse=True)
def _as_before() -> Any:
    yield
    set_scale(1.0)
    SETTINGS.update(alpha=1.0)
    TOOLS.ALPHA = 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", HOOKS, ids=lambda make: make.__name__)
def test_what_a_hook_reads_names_the_model(make: Callable[[], tuple[Any, Change]]) -> None:
    model = make_model("llama")
    hook, change = make()
    model.model.layers[0].mlp.register_forward_hook(hook)
    state = ModelState(model)
    before = state.look()
    assert state.look() == before
    with torch.no_grad():
        model(torch.arange(5)[None])
    assert state.look() == before
    change()
    assert state.look() != before


def test_what_a_forward_on_the_object_reads_names_the_model() -> None:
    model = make_model("llama")
    mlp, alpha = model.model.layers[0].mlp, [1.0]
    own = mlp.forward
    mlp.forward = lambda given: own(given) * alpha[0]
    state = ModelState(model)
    before = state.look()
    alpha[0] = 2.0
    assert state.look() != before


def changed_class(model: PreTrainedModel) -> type:
    mlp = model.model.layers[0].mlp

    class Scaled(type(mlp)):  # type: ignore[misc]
        alpha = 1.0
        parts = {"alpha": 1.0}  # noqa: RUF012
        vector = torch.ones(48)

        def __call__(self, given: torch.Tensor) -> torch.Tensor:
            return super().__call__(given) * self.alpha * self.parts["alpha"] * self.vector

    mlp.__class__ = Scaled
    return Scaled


CLASS_CHANGES: list[Callable[[Any], object]] = [
    lambda kind: setattr(kind, "alpha", 2.0),
    lambda kind: kind.parts.update(alpha=2.0),
    lambda kind: kind.vector.data.mul_(2),
    lambda kind: setattr(kind, "forward", lambda self, given: given),  # which it had from its base
    lambda kind: setattr(kind, "act_fn", torch.nn.Identity()),
]


@pytest.mark.parametrize("change", CLASS_CHANGES)
def test_what_a_class_has_names_the_model(change: Callable[[type], object]) -> None:
    model = make_model("llama")
    kind = changed_class(model)
    state = ModelState(model)
    before = state.look()
    assert state.look() == before
    change(kind)
    assert state.look() != before


def test_functions_of_torch_that_a_file_calls_count(monkeypatch: pytest.MonkeyPatch) -> None:
    state = ModelState(make_model("llama"))
    before = state.look()
    own = torch.nn.functional.linear
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", lambda *given: own(*given) * 2)
        assert state.look() != before
    assert state.look() == before


def test_modes_around_torch_count_in_their_thread() -> None:
    class Doubling(TorchFunctionMode):
        def __torch_function__(self, function: Any, kinds: object, args: Any = (), kwargs: Any = None) -> Any:
            found = function(*args, **(kwargs or {}))
            return found * 2 if function is torch.nn.functional.linear else found

    state = ModelState(make_model("llama"))
    before = state.look()
    with Doubling():
        within = state.look()
    with Doubling():
        assert len({before, within, state.look()}) == 3
    with torch.device("cpu"):
        assert state.look() == before


def counting() -> Any:
    calls = 0

    def hook(*_: object) -> None:
        nonlocal calls
        calls += 1

    return hook


def collecting() -> Any:
    found: list[object] = []
    return lambda module, given, output: found.append(output)


def logging() -> Any:
    found: dict[int, object] = {}
    return lambda module, given, output: found.__setitem__(len(found), output)


def numbering() -> Any:
    numbers = itertools.count()

    def hook(*_: object) -> None:
        next(numbers)

    return hook


@pytest.mark.parametrize("make", [counting, collecting, logging, numbering])
def test_what_hooks_note_of_each_pass_is_learned_and_left_out(make: Callable[[], Any]) -> None:
    model = make_model("llama")
    state = ModelState(model)
    for _ in range(10):  # learned from, before there is a hook
        with state.learning():
            model(torch.arange(5)[None])
    model.model.layers[0].register_forward_hook(make())
    before = state.look()
    for length in (5, 3):
        with state.learning():
            model(torch.arange(length)[None])
        if state.look() != before:
            state.suspect()
    for length in (4, 3, 5):
        with state.learning():
            model(torch.arange(length)[None])
    before = state.look()
    model(torch.arange(6)[None])
    assert state.look() == before


def test_what_somebody_changes_once_while_a_pass_is_learned_from_still_counts() -> None:
    model = make_model("llama")
    alpha = {"alpha": 1.0}
    model.model.layers[0].mlp.register_forward_hook(lambda module, given, output: output * alpha["alpha"])
    state = ModelState(model)
    with state.learning():
        alpha["alpha"] = 2.0
    for _ in range(3):
        with state.learning():
            model(torch.arange(5)[None])
    before = state.look()
    alpha["alpha"] = 3.0
    assert state.look() != before
