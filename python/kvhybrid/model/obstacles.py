"""What keeps a call from running through the cache: inputs that shape K and V beside the tokens.

Pages are found by tokens alone. Whatever else goes into K and V (images, embeddings, token types, dropout)
would be served to a text that never had it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import GenerationConfig

from kvhybrid.model.versions import CACHE_NAMES

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

# Arguments of ``forward`` that leave the K and V of given tokens at given places alone.
NEUTRAL: Final = frozenset(
    {
        "input_ids",
        "attention_mask",
        "position_ids",
        *CACHE_NAMES,
        "cache_position",
        "use_cache",
        "logits_to_keep",
        "num_logits_to_keep",
        "labels",
        "return_dict",
        "output_hidden_states",
        "output_router_logits",
        "shift_labels",
    }
)
# How arguments of ``generate`` begin that change what a forward pass computes.
SHAPING: Final = (
    "inputs_embeds",
    "position_ids",
    "token_type_ids",
    "encoder_outputs",
    "input_features",
    "pixel_",
    "image_",
    "video_",
)

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
DROPOUT: Final = "a model in training mode: dropout would be cached"
# Whoever asks for no cache, or for another one, knows that ours is not used.
ASKED_FOR: Final = (NO_CACHE, "cache_implementation")


def mixes_rows(model: PreTrainedModel) -> bool:
    """Return whether one row's K and V may depend, in their last bits, on the other rows: with experts."""
    config = model.config.get_text_config()
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any(getattr(config, name, None) for name in names)


def obstacle_to_step(kwargs: dict[str, Any], *, drops_out: bool) -> str | None:
    """Return what of a forward pass, dropout or one of its arguments, a session cannot take, or None."""
    if kwargs.get("input_ids") is None:
        return "a forward pass without input_ids: embeddings hide the tokens"
    for name, value in kwargs.items():
        # Models of images get an empty dictionary of encodings from ``generate`` when there is none.
        is_empty = isinstance(value, dict) and not value
        if name not in NEUTRAL and value is not None and value is not False and not is_empty:
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


def obstacle_to_reuse(
    ids: Any, kwargs: dict[str, Any], settings: dict[str, Any], *, in_session: bool, drops_out: bool
) -> str | None:
    """Return what of a call to ``generate`` keeps its prompt from being cached, or None.

    ``settings``: what ``settings_of`` returned. ``in_session``: the caller passed a session, and gets what
    transformers gives with a cache that holds something: hidden states of the tokens computed, not of those
    that were cached.
    """
    if settings["use_cache"] is False:
        return NO_CACHE
    for name in ("cache_implementation", "assistant_early_exit", "output_attentions"):
        if settings[name]:
            return name
    if (obstacle := _obstacle_in_prompt(ids, kwargs, in_session=in_session)) is not None:
        return obstacle
    if not in_session and settings["output_hidden_states"] and settings["return_dict_in_generate"]:
        return "output_hidden_states: those of cached tokens are not computed"
    return DROPOUT if drops_out else None


def _obstacle_in_prompt(ids: Any, kwargs: dict[str, Any], *, in_session: bool) -> str | None:
    if ids is None:
        return "a prompt without token ids: embeddings hide the tokens"
    if not isinstance(ids, torch.Tensor):
        return f"token ids as {type(ids).__name__}"
    mask = kwargs.get("attention_mask")
    if (obstacle := _obstacle_in_mask(mask)) is not None:
        return obstacle
    if not in_session and mask is not None and mask.shape != ids.shape:
        return f"an attention_mask of {list(mask.shape)} for input_ids of {list(ids.shape)}"
    return next(
        (name for name, value in kwargs.items() if value is not None and name.startswith(SHAPING)), None
    )


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
