"""The live states of one session: what layers that keep a state carry from step to step.

The objects that the model updates are transformers' own (``LinearAttentionLayer`` and those that hold K
and V besides), so that each release reads and writes them as it likes. This is the one place that looks
into them: to take one row's state out, to put states back, to reorder rows.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import cache_utils

from kvhybrid.cache.measured import layer_kinds
from kvhybrid.errors import UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from transformers import PretrainedConfig

    from kvhybrid.cache.states import State

# What we can take a state out of. A layer class of a model's own may keep more than these do.
KNOWN = (
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
)


def state_layers(config: PretrainedConfig) -> dict[int, Any]:
    """Return an empty layer object for each layer that keeps a state, by index.

    Raises ``UnsupportedError`` naming the layer and its kind where the state is not of a kind that can be
    taken out and put back.
    """
    mixin = getattr(cache_utils, "LinearAttentionCacheLayerMixin", None)
    if mixin is None:  # transformers 4 has a cache class for each such model
        return {}
    found: dict[int, Any] = {}
    kinds = layer_kinds(config)
    for index, layer in enumerate(cache_utils.DynamicCache(config=config).layers):
        # Up to transformers 5.18 layers that keep nothing at all have such an object, too.
        if not isinstance(layer, mixin) or kinds[index : index + 1] in (["moe"], ["mlp"]):
            continue
        if type(layer).__name__ not in KNOWN:
            raise UnsupportedError(
                f"{name_layers(config, [index])} keeps a {type(layer).__name__}, whose state cannot be taken "
                "out at a block's end"
            )
        found[index] = layer
    return found


def name_layers(config: PretrainedConfig, layers: Iterable[int]) -> str:
    """Name layers by index and kind, for messages: ``layers 0, 2 (conv)``."""
    kinds = layer_kinds(config)
    by_kind: dict[str, list[int]] = {}
    for index in layers:
        by_kind.setdefault(kinds[index] if index < len(kinds) else "of a kind unnamed", []).append(index)
    return "; ".join(
        f"layer{'s' if len(places) > 1 else ''} {', '.join(map(str, places))} ({kind})"
        for kind, places in by_kind.items()
    )


class LayerStates:
    """States ``[batch, ...]`` of one session's layers. ``empty``: what ``state_layers`` returned."""

    def __init__(self, empty: dict[int, Any]) -> None:
        self._empty = empty
        self._layers: list[Any] | dict[int, Any] = {}
        self.touched: set[int] = set()
        """The layers that the forward pass under way has looked at; the model's cache says so."""
        self.reset()

    def show_in(self, layers: list[Any]) -> None:
        """Put the layer objects into ``layers``, the list that the model's cache looks them up in."""
        for index in self._empty:
            layers[index] = self._layers[index]
        self._layers = layers

    def reset(self) -> None:
        """Begin anew: no text, nothing recorded."""
        for index, layer in self._empty.items():
            self._layers[index] = copy.deepcopy(layer)

    def __iter__(self) -> Iterator[Any]:
        return (self._layers[index] for index in self._empty)

    def take(self, row: int) -> State:
        """Return a copy of one row's state."""
        taken: list[torch.Tensor | None] = []
        # A copy made under inference_mode could not be put back outside of it.
        with torch.inference_mode(False), torch.no_grad():
            for layer in self:
                for key, conv in layer.conv_states.items():
                    taken.append(_narrowed(conv, row, layer.conv_kernel_size[key]))
                    taken.append(_narrowed(layer.recurrent_states[key], row, None))
        return tuple(taken)

    def restore(self, states: list[State]) -> None:
        """Go on from ``states``, one a row."""
        self.reset()
        with torch.inference_mode(False), torch.no_grad():
            parts = iter([_stacked(parts) for parts in zip(*states, strict=True)])
            for layer in self:
                for key in layer.conv_states:
                    conv, recurrent = next(parts), next(parts)
                    if conv is not None:
                        layer.update_conv_state(conv, key, conv_kernel_size=conv.shape[-1])
                    if recurrent is not None:
                        layer.update_recurrent_state(recurrent, key)

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        index = torch.tensor(rows, device="cpu")
        self._change(lambda part: part.index_select(0, index.to(part.device)))

    def left_out(self) -> list[int]:
        """Return the layers that the forward pass did not look at: their states have not gone on."""
        return sorted(self._empty.keys() - self.touched)

    def settle(self) -> None:
        """Begin a forward pass: make what the last one left fit for the mode that this one runs in."""
        self.touched.clear()
        outside = not torch.is_inference_mode_enabled()

        def settled(part: torch.Tensor) -> torch.Tensor:
            if part.is_inference():
                return part.clone() if outside else part
            return part.detach() if part.requires_grad else part

        self._change(settled)

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            for layer in self:
                for held in (layer.conv_states, layer.recurrent_states):
                    held.update({key: change(part) for key, part in held.items() if part is not None})

    def record(self) -> None:
        """Keep what ``crop`` needs from now on, until ``reset``."""
        for layer in self:
            layer.activate_past_recording()

    def crop(self, tokens: int, columns: int) -> bool:
        """Take the last ``tokens`` of ``columns`` back, where that was recorded. False, unchanged, if not."""
        for layer in self:
            for key, conv in layer.conv_states.items():
                if not layer.record_past or conv is None or layer.recurrent_states[key] is not None:
                    return False
                left = conv.shape[-1] - tokens
                # With fewer than the convolution reads only a text's beginning is complete.
                if left < layer.conv_kernel_size[key] and not 0 < left == columns - tokens:
                    return False
        for layer in self:
            for key, conv in layer.conv_states.items():
                left = conv.shape[-1] - tokens
                layer.conv_states[key] = conv[..., max(left - layer.conv_kernel_size[key], 0) : left]
        return True


def _narrowed(part: torch.Tensor | None, row: int, width: int | None) -> torch.Tensor | None:
    """One row's part, copied; a convolution's in its usual width, which recording does not keep to."""
    if part is None:
        return None
    part = part[row].detach()
    if width is not None and part.shape[-1] != width:
        part = torch.nn.functional.pad(part, (max(width - part.shape[-1], 0), 0))[..., -width:]
    return part.clone()


def _stacked(parts: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
    tensors = [part for part in parts if part is not None]
    return torch.stack(tensors) if tensors else None
