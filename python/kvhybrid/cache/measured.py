"""What a model puts into its own cache, seen by running it on a few tokens.

Names of configurations disagree with each other and with what their models do (shared K and V, latent
attention, layers of two kinds); the tensors do not. Knows tensors alone, no layer classes: whatever looks
like a cache of one K and V a layer is read, and everything else is refused by layer.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kvhybrid.errors import LayoutError, UnsupportedError
from kvhybrid.layout import LayerShape
from kvhybrid.model_shape import ATTENTION_LAYERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

TOKENS = 3
# Where layers of the caches we know keep what is no K and V.
STATES = {
    "conv_states": "a convolution's state",
    "recurrent_states": "a recurrent state",
    "ssm_states": "a recurrent state",
    "indexer_keys": "an index of its own over the tokens",
}
# Of these in layers that let it be taken out and put back (``LinearAttentionLayer`` of transformers).
TAKEN = ("conv_states", "recurrent_states")


@dataclass(frozen=True)
class MeasuredLayers:
    """One entry a layer, None where no K and V are kept; ``dtype`` is that of the first K."""

    shapes: list[LayerShape | None]
    devices: list[torch.device]
    dtype: torch.dtype
    state_bytes: int = 0
    """Bytes of what layers keep of a whole text in a form that can be taken out and put back."""


def measure_layers(model: PreTrainedModel) -> MeasuredLayers:
    """Run ``model`` on three tokens and return the shapes and devices of the K and V it kept.

    Raises ``LayoutError`` for a model that keeps none, ``UnsupportedError``, naming the layer, where a
    layer keeps something else.
    """
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedError(f"{name} is an encoder-decoder model: only decoders are served")
    kept = _run(model, name)
    kept = getattr(kept, "self_attention_cache", kept)  # decoders that could have an encoder have two
    layers = getattr(kept, "layers", None)
    kinds = layer_kinds(model.config)
    if not isinstance(layers, list):
        _refuse_states(kept, name, kinds)
        found = "nothing of a text" if kept is None else f"a {type(kept).__name__} without K and V by layer"
        raise LayoutError(f"{name} keeps {found}: it has no KV cache")
    state_bytes = 0
    for index, layer in enumerate(layers):
        for attribute, words in STATES.items():
            state = getattr(layer, attribute, None)
            if not _has_tensors(state):
                continue
            if (
                attribute not in TAKEN
                or not isinstance(state, dict)
                or not hasattr(layer, "has_previous_state")
            ):
                raise UnsupportedError(_refusal(name, index, kinds, words))
            state_bytes += sum(part.nbytes for part in state.values() if part is not None)
    if (state := getattr(kept, "linear_cache", None)) is not None and _has_tensors(state):
        index = next(index for index, part in enumerate(state) if _has_tensors(part))
        raise UnsupportedError(_refusal(name, index, kinds, "a recurrent state in a list of its model's own"))
    pairs = [_pair(layer, index, name) for index, layer in enumerate(layers)]
    first = next((pair[0] for pair in pairs if pair is not None), None)
    if first is None:
        if state_bytes:
            raise UnsupportedError(_refusal(name, 0, kinds, STATES["recurrent_states"]))
        raise LayoutError(f"{name} keeps no K and V in any of its {len(layers)} layers: it has no KV cache")
    return MeasuredLayers(
        [_shape(*pair) if pair is not None else None for pair in pairs],
        [pair[0].device if pair is not None else first.device for pair in pairs],
        first.dtype,
        state_bytes,
    )


@contextmanager
def in_evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Run ``model`` in evaluation mode and without gradients, and leave each of its modules in its own mode.

    Not ``model.train(was_training)``: parts of a model in training may be frozen in evaluation mode.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def input_device(model: PreTrainedModel) -> torch.device:
    """Return where the model's inputs belong: with its weights, or, offloaded, where they are computed."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    execution = getattr(getattr(model, "_hf_hook", None), "execution_device", None)  # accelerate's
    return torch.device(execution if execution is not None else "cpu")


def layer_kinds(config: Any) -> list[str]:
    """Return what the configuration calls each of its layers; empty when it does not say."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    return list(kinds)


def _run(model: PreTrainedModel, name: str) -> Any:
    """Return the cache that the model made for itself over a few tokens."""
    ids = torch.arange(TOKENS, device=input_device(model))[None]
    try:
        with in_evaluation(model):
            output = model(input_ids=ids, use_cache=True)
    except Exception as error:  # whatever a model raises, the reason it is refused is that it does
        raise UnsupportedError(
            f"{name} cannot be run on token ids alone: {type(error).__name__}: {error}"
        ) from error
    # Its names through the versions of transformers, the newest first: older ones are deprecated there.
    names = ("cache", "past_key_values", "cache_params")
    return next((kept for name in names if (kept := getattr(output, name, None)) is not None), None)


def _refuse_states(kept: object, name: str, kinds: list[str]) -> None:
    """Raise, naming the layer, for caches of older releases: lists of states over all layers."""
    foreign = next((index for index, kind in enumerate(kinds) if kind not in ATTENTION_LAYERS), None)
    if foreign is not None:
        raise UnsupportedError(_refusal(name, foreign, kinds, "a recurrent state"))
    for attribute, words in STATES.items():
        if _has_tensors(getattr(kept, attribute, None)):
            raise UnsupportedError(_refusal(name, 0, kinds, words))


def _has_tensors(state: object) -> bool:
    if isinstance(state, torch.Tensor):
        return state.numel() > 0
    if isinstance(state, dict):
        return any(_has_tensors(part) for part in state.values())
    return isinstance(state, list | tuple) and any(_has_tensors(part) for part in state)


def _refusal(name: str, index: int, kinds: list[str], words: str) -> str:
    kind = f" ({kinds[index]})" if index < len(kinds) else ""
    return f"{name}: layer {index}{kind} keeps {words}, which is not K and V: it cannot be cached in pages"


def _pair(layer: object, index: int, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
    if not isinstance(key, torch.Tensor) or not isinstance(value, torch.Tensor):
        return None
    if key.dim() != 4 or value.dim() != 4 or key.shape[:3] != value.shape[:3]:
        raise UnsupportedError(
            f"{name}: layer {index} keeps K {list(key.shape)} and V {list(value.shape)}: they must be "
            "[batch, heads, tokens, width]"
        )
    if not 0 < key.shape[2] <= TOKENS:  # fewer with a window as small
        raise UnsupportedError(f"{name}: layer {index} keeps K of {key.shape[2]} tokens for {TOKENS}")
    return key, value


def _shape(key: torch.Tensor, value: torch.Tensor) -> LayerShape:
    return LayerShape(num_kv_heads=key.shape[1], head_dim=key.shape[3], value_head_dim=value.shape[3])
