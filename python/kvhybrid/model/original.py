"""The model as it is without us: out of its wrappers (``torch.compile``, peft), and copied without ours.

Knows which names an attachment sets on a model, and nothing of caches.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from kvhybrid.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedModel

ATTACHED: Final = "_kvhybrid_attachment"
# What an attachment sets on the model object beside itself.
WRAPPED: Final[tuple[str, ...]] = ("forward", "generate", "__getstate__")
# Marks a wrapper of ours.
MARK: Final = "_is_kvhybrid_wrapper"
# What a model must have to write text.
NEEDED: Final[tuple[str, ...]] = ("config", "forward", "generate", "get_input_embeddings")


def original(model: Any) -> PreTrainedModel:
    """Return the transformers model inside what ``torch.compile`` or peft made of it, or the model itself.

    Raises ``UnsupportedError`` for what writes no text.
    """
    model = getattr(model, "_orig_mod", model)
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not isinstance(model, torch.nn.Module) or not all(hasattr(model, name) for name in NEEDED):
        raise UnsupportedError(
            f"{type(model).__name__} does not generate text: give a causal language model of transformers"
        )
    return cast("PreTrainedModel", model)


def plain_forward(model: PreTrainedModel) -> Callable[..., Any]:
    """Return the function behind ``model.forward`` when it was compiled, else ``model.forward``."""
    forward: Callable[..., Any] = getattr(model.forward, "_torchdynamo_orig_callable", model.forward)
    return forward


def has_compiled_parts(model: PreTrainedModel) -> bool:
    """Return whether any module inside the model was compiled: it runs as such whoever calls the model."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in model.modules()
        if module is not model
    )


def plain_state(model: PreTrainedModel, own: dict[str, Any], ours: Mapping[str, object]) -> dict[str, Any]:
    """Return the attributes of an attached model without the attachment: what is copied and pickled.

    ``own``: what the attachment replaced on the object. ``ours``: what it put there.
    """
    state = {name: value for name, value in vars(model).items() if name != ATTACHED}
    for key, value in list(state.items()):
        name = next((name for name, wrapper in ours.items() if wrapper is value), None)
        if name is None:
            continue
        if key != name or name in own:  # others keep what they found, to put it back later
            state[key] = own[name] if name in own else getattr(type(model), name).__get__(model)
        else:
            del state[key]
    return state


def leads_to(function: object, target: object, depth: int = 4) -> bool:
    """Return whether a function calls ``target`` as far as can be seen: itself, or one that wraps it."""
    if function is target:
        return True
    if depth == 0 or not callable(function):
        return False
    inner: list[object] = [
        getattr(function, name, None)
        for name in ("__wrapped__", "__func__", "func", "_torchdynamo_orig_callable")
    ]
    for cell in getattr(function, "__closure__", None) or ():
        try:
            inner.append(cell.cell_contents)
        except ValueError:
            continue
    inner += getattr(function, "__defaults__", None) or ()
    inner += getattr(function, "args", ()) if isinstance(function, functools.partial) else ()
    return any(each is not None and leads_to(each, target, depth - 1) for each in inner)


def wrapper(own: Callable[..., Any], ours: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with the signature of ``own`` (transformers looks at it) that calls ``ours``."""

    @functools.wraps(own)
    def call(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    vars(call)[MARK] = True
    return call


def is_ours(name: str, value: object) -> bool:
    """Return whether an attachment set an attribute of a model object, or K and V do not depend on it."""
    if name == "forward":
        return MARK in getattr(value, "__dict__", ())
    return name == ATTACHED or name in WRAPPED


def replaced(model: PreTrainedModel) -> dict[str, Any]:
    """Return what stood on a model object in the places that an attachment took."""
    attachment = model.__dict__.get(ATTACHED)
    return dict(attachment.own) if attachment is not None else {}
