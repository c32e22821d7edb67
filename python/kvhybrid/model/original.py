"""The model as it is without us: out of its wrappers (``torch.compile``, peft), and copied without ours.

Knows which names an attachment sets on a model, and nothing of caches.
"""

from __future__ import annotations

import copy
import functools
from typing import TYPE_CHECKING, Any, Final, cast

import torch

from kvhybrid.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

ATTACHED: Final = "_kvhybrid_attachment"
# What an attachment sets on the model object beside itself.
WRAPPED: Final[tuple[str, ...]] = ("forward", "generate", "__deepcopy__")
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


def plain_copy(
    model: PreTrainedModel, own: dict[str, Any], memo: dict[int, Any], implementation: str | None
) -> PreTrainedModel:
    """Deep-copy an attached model as it is without the attachment.

    ``own``: what the attachment replaced on the object. ``implementation``: the model's own attention
    when ours is in place.
    """
    kind = type(model)
    twin: PreTrainedModel = kind.__new__(kind)
    memo[id(model)] = twin
    ours = (*WRAPPED, ATTACHED)
    state = {name: value for name, value in model.__dict__.items() if name not in ours} | own
    twin.__dict__.update(copy.deepcopy(state, memo))
    if implementation is not None:
        twin.set_attn_implementation(implementation)
    return twin


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
