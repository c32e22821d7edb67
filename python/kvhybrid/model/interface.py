"""Our attention function and its mask function, as ``transformers`` registers them.

A marked key (``PageHandle``) carries where its past lies; everything else, a forward pass without a
cache, training, another cache, is handed to torch's own attention as before.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from kvhybrid.errors import UnsupportedError

if TYPE_CHECKING:
    from kvhybrid.cache.step import Step
    from kvhybrid.model.attention import PagedAttention

IMPLEMENTATION = "kvhybrid"
# What a model may hand to its attention function that changes the result and that we do not compute.
REFUSED = ("softcap", "s_aux", "position_bias")

_thread = threading.local()


def running_paged(value: bool) -> None:
    """Say whether the forward pass under way in this thread reads pages."""
    _thread.paged = value


class PageHandle(torch.Tensor):
    """The step's own keys, marked with the pages where their past lies."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # torch's own way
    pages: tuple[PagedAttention, Step, int, torch.Tensor]

    @classmethod
    def mark(cls, key: torch.Tensor, attention: PagedAttention, step: Step, layer: int) -> PageHandle:
        """Return ``key`` as a handle; no copy."""
        handle: PageHandle = key.as_subclass(cls)
        handle.pages = (attention, step, layer, key)
        return handle


def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over pages when the key is marked, and as ``sdpa`` does when it is not.

    ``query`` ``[batch, heads, tokens, head_dim]``; returns ``[batch, tokens, heads, head_dim]`` and None.
    """
    if not isinstance(key, PageHandle):
        output, weights = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, weights
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise UnsupportedError(
                f"{type(module).__name__} attends with {name}, which the paged route does not compute"
            )
    attention, step, layer, plain = key.pages
    return attention.attend(step, layer, query, plain, value, scaling, sliding_window), None


def paged_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return no mask for a paged step, whose rows know their own limits, and ``sdpa``'s otherwise."""
    if getattr(_thread, "paged", False):
        return None
    mask: torch.Tensor | None = sdpa_mask(*args, **kwargs)
    return mask


def register() -> None:
    """Make the implementation known to transformers, function and mask both. Idempotent."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, paged_mask)
