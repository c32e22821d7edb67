"""What keeps a call from running through the cache: inputs that shape K and V beside the tokens.

Pages are found by tokens alone. Whatever else goes into K and V (images, embeddings, token types, dropout)
would be served to a text that never had it.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.utils.generic import ModelOutput

from kvhybrid.model.versions import CACHE_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel

# Arguments of ``forward`` that a session sees to: what they say of the tokens is part of what it compares.
COVERED: Final = frozenset(
    {
        "input_ids",
        "attention_mask",
        "position_ids",
        *CACHE_NAMES,
        "cache_position",
        "use_cache",
    }
)
# How arguments begin that ask for outputs, and those that shape loss and logits: K and V are the same.
ASKING: Final = ("output_", "return_")
AFTERWARDS: Final = frozenset(
    {"labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "num_logits_to_keep"}
)
# An output that attention over pages does not have.
WEIGHTS_OUT: Final = "output_attentions"
# Values that a forward pass can compute with. What else comes by a name that it does not have (a tokenizer,
# a streamer) it cannot read.
COMPUTABLE: Final = (
    torch.Tensor, np.ndarray, bool, int, float, complex, str, bytes, list, tuple, set, dict, ModelOutput
)  # fmt: skip
# Arguments of ``generate`` that go on from another place than the prompt's first token.
PLACING: Final = ("position_ids", "cache_position")
# What ``generate`` takes for itself and hands on to no forward pass.
OF_GENERATE: Final = frozenset(
    {*inspect.signature(GenerationMixin.generate).parameters, *vars(GenerationConfig())}
) - {"kwargs"}

TOKENS: Final = ("pad_token_id", "eos_token_id")
# What of a generation configuration decides about reuse.
SETTINGS: Final = (
    "use_cache",
    "cache_implementation",
    "assistant_early_exit",
    "output_attentions",
    "output_hidden_states",
    "return_dict_in_generate",
    "prefill_chunk_size",
    *TOKENS,
)

NO_CACHE: Final = "use_cache=False: it is a cache"
NO_HIDDEN: Final = "output_hidden_states: those of cached tokens are not computed"
DROPOUT: Final = "a model in training mode: dropout would be cached"
# Whoever asks in a call for no cache, or for another one, knows that ours is not used.
ASKED_FOR: Final = (NO_CACHE, "cache_implementation")
CALL: Final = "from the call"
GIVEN: Final = "from the generation configuration of the call"
# Settings that are obstacles, by what is said of them.
OF_SETTINGS: Final = {NO_CACHE: "use_cache", NO_HIDDEN: "output_hidden_states"}


def mixes_rows(model: PreTrainedModel) -> bool:
    """Return whether one row's K and V may depend, in their last bits, on the other rows: with experts."""
    config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(getattr(config, name, None) for name in names)


def changes_values(name: str, value: object, parameters: Mapping[str, object]) -> bool:
    """Return whether an argument of a forward pass may change the K and V of given tokens at given places.

    ``parameters``: the names and defaults of ``forward``. Decided by a rule and not by a list, so that models
    and versions that no one has seen yet are judged alike: what says nothing (None, False, empty, the
    default), what a session compares itself, and what only asks for outputs does not; nor does an object
    that is no number, text or tensor, under a name that ``forward`` does not have. All else may.
    """
    if value is None or value is False or (isinstance(value, dict | list | tuple) and not value):
        return False
    if name in COVERED or name in AFTERWARDS:
        return False
    if name.startswith(ASKING):
        return name == WEIGHTS_OUT
    if name in parameters:
        default = parameters[name]
        return not (
            type(default) is type(value) and isinstance(value, bool | int | float | str) and value == default
        )
    return isinstance(value, COMPUTABLE)


def obstacle_to_step(
    kwargs: dict[str, Any], parameters: Mapping[str, object], *, drops_out: bool
) -> str | None:
    """Return what of a forward pass, dropout or one of its arguments, a session cannot take, or None.

    ``parameters``: the names and defaults of the model's ``forward``.
    """
    if kwargs.get("input_ids") is None:
        return "a forward pass without input_ids: embeddings hide the tokens"
    for name, value in kwargs.items():
        if changes_values(name, value, parameters):
            return name
    if (obstacle := _obstacle_in_mask(kwargs.get("attention_mask"))) is not None:
        return obstacle
    if kwargs.get("use_cache") is False:
        return NO_CACHE
    return DROPOUT if drops_out else None


def _obstacle_in_mask(mask: Any) -> str | None:
    if mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        return None
    shape = f"{mask.dim()} dimensions" if isinstance(mask, torch.Tensor) else type(mask).__name__
    return f"an attention_mask of {shape}: it takes [batch, tokens] only"


def settings_of(
    kwargs: dict[str, Any], given: GenerationConfig | None, own: GenerationConfig
) -> dict[str, Any]:
    """Return the ``SETTINGS`` that hold for a call of ``generate``.

    As transformers does: what the call says itself, then what the configuration that it was ``given`` says
    and is no default, then what the model's ``own`` says.
    """
    settings = {name: getattr(own, name, None) for name in SETTINGS}
    if given is not None:
        defaults = GenerationConfig()
        for name in SETTINGS:
            value = getattr(given, name, None)
            # With ``use_model_defaults=False`` (transformers 4) tokens alone come from the model's own.
            is_own = name not in TOKENS and kwargs.get("use_model_defaults") is False
            if is_own or (value is not None and value != getattr(defaults, name, None)):
                settings[name] = value
    return settings | {name: kwargs[name] for name in SETTINGS if name in kwargs}


def origin_of(name: str, kwargs: dict[str, Any], given: GenerationConfig | None, value: object) -> str:
    """Say where a setting of a call of ``generate`` comes from."""
    if name in kwargs:
        return CALL
    if given is not None and getattr(given, name, None) == value:
        return GIVEN
    return "from the model's own generation configuration"


def obstacle_to_reuse(
    ids: Any,
    kwargs: dict[str, Any],
    settings: dict[str, Any],
    parameters: Mapping[str, object],
    *,
    in_session: bool,
    drops_out: bool,
) -> str | None:
    """Return what of a call to ``generate`` keeps its prompt from being cached, or None.

    ``settings``: what ``settings_of`` returned. ``parameters``: the names and defaults of the model's
    ``forward``. ``in_session``: the caller passed a session, and gets what transformers gives with a cache
    that holds something: hidden states of the tokens computed, not of those that were cached.
    """
    if settings["use_cache"] is False:
        return NO_CACHE
    for name in ("cache_implementation", "assistant_early_exit", WEIGHTS_OUT):
        if settings[name]:
            return name
    if (obstacle := _obstacle_in_prompt(ids, kwargs, parameters, in_session=in_session)) is not None:
        return obstacle
    if not in_session and settings["output_hidden_states"] and settings["return_dict_in_generate"]:
        return NO_HIDDEN
    return DROPOUT if drops_out else None


def _obstacle_in_prompt(
    ids: Any, kwargs: dict[str, Any], parameters: Mapping[str, object], *, in_session: bool
) -> str | None:
    if ids is None:
        return "a prompt without token ids: embeddings hide the tokens"
    if not isinstance(ids, torch.Tensor):
        return f"token ids as {type(ids).__name__}"
    mask = kwargs.get("attention_mask")
    if (obstacle := _obstacle_in_mask(mask)) is not None:
        return obstacle
    if not in_session and mask is not None and mask.shape != ids.shape:
        return f"an attention_mask of {list(mask.shape)} for input_ids of {list(ids.shape)}"
    for name, value in kwargs.items():
        if value is not None and name in PLACING:
            return name
        # What a recipe is given (``custom_generate``) is the recipe's; each forward pass is asked again.
        is_given = name not in OF_GENERATE and not kwargs.get("custom_generate")
        if (name in parameters or is_given) and changes_values(name, value, parameters):
            return name
    return None


def precision_of(model: PreTrainedModel) -> tuple[torch.device, torch.dtype]:
    """Return where a model computes K and V, and in which dtype; autocast counts."""
    weight = next(_parameters(model))
    kind = weight.device.type
    is_cast = kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)
    return weight.device, torch.get_autocast_dtype(kind) if is_cast else weight.dtype


def _parameters(module: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
    """Yield parameters in torch's order. Every step asks for one, and torch's own walk spells names."""
    yield from (own for own in module._parameters.values() if own is not None)
    for child in module._modules.values():
        if child is not None:
            yield from _parameters(child)


def obstacle_in_precision(
    now: tuple[torch.device, torch.dtype], before: tuple[torch.device, torch.dtype], pages: torch.dtype
) -> str | None:
    """Return why K and V of a model as it is ``now`` have no place in pages laid out for it ``before``."""
    if now[0] != before[0]:
        return f"a model that was moved from {before[0]} to {now[0]}: detach and attach it again"
    if now[1] != before[1] and torch.promote_types(now[1], pages) != pages:
        return f"K and V in {now[1]}: its pages hold {pages}"
    return None


def standing_obstacle(model: PreTrainedModel) -> str | None:
    """Return what of a checkpoint keeps from being cached every call that says nothing else, or None."""
    own = model.generation_config
    for name in ("use_cache", "cache_implementation"):
        value = getattr(own, name, None)
        if (name == "use_cache" and value is False) or (name != "use_cache" and value):
            return f"{name}={value!r} in the model's own generation configuration"
    if model.config.get_text_config().use_cache is False and own.use_cache is None:
        return "use_cache=False in the model's configuration"
    return None


def mask_of(ids: torch.Tensor, kwargs: dict[str, Any], settings: dict[str, Any]) -> torch.Tensor | None:
    """Return the prompt's attention mask: the one given, or the one that ``generate`` will infer.

    transformers takes the padding token for padding wherever it stands, unless it also ends texts.
    """
    mask: torch.Tensor | None = kwargs.get("attention_mask")
    if mask is not None:
        return mask
    pad, ends = (settings[name] for name in TOKENS)
    known_ends = ends if isinstance(ends, list | tuple) else [ends]
    if not isinstance(pad, int) or pad in known_ends or not bool((ids == pad).any()):
        return None
    return ids.ne(pad).long()
