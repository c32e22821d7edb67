"""Our attention function and its mask function, as ``attention_name`` registers them with ``transformers``.

A marked key (``PageHandle``) carries where its past lies; everything else, a forward pass without a
cache, training, another cache, is handed to the model's own attention as before.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from kvhybrid.errors import UnsupportedError
from kvhybrid.model.attention import decode
from kvhybrid.model.masks import current_trace
from kvhybrid.model.observed import current_observed
from kvhybrid.model.own_attention import CAP, EXTRAS, MASKS, SINKS, attend_itself
from kvhybrid.model.scored import Extras
from kvhybrid.model.versions import mask_function_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

    from kvhybrid.cache.step import Step
    from kvhybrid.model.attention import PagedAttention

# What a model may hand to its attention function that changes the result and that we do not compute.
REFUSED = ("position_bias", "head_mask", "layer_head_mask")

# What may be asked of a marked key without attending to it.
HARMLESS = (
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_cuda", "is_cpu")
    ),
    torch.Tensor.size,
    torch.Tensor.dim,
    torch.Tensor.stride,
)

_thread = threading.local()
_numbers_lock = threading.Lock()
_numbers: weakref.WeakKeyDictionary[PreTrainedModel, int] = weakref.WeakKeyDictionary()
_next_number = itertools.count()


def model_number(model: PreTrainedModel) -> int:
    """Return a number that no other model of this process has, had or will have."""
    with _numbers_lock:
        if model not in _numbers:
            _numbers[model] = next(_next_number)
        return _numbers[model]


@contextmanager
def reading_pages(value: bool) -> Iterator[None]:
    """Say whether the forward pass inside reads pages; for this thread, and as before behind it."""
    before = getattr(_thread, "paged", False)
    _thread.paged = value
    try:
        yield
    finally:
        _thread.paged = before


def is_reading_pages() -> bool:
    """Return True inside a forward pass that reads pages, in this thread."""
    return getattr(_thread, "paged", False)


class PageHandle(torch.Tensor):
    """The step's own keys, marked with the pages where their past lies.

    Nothing but our attention may compute with it: whoever attended to these keys alone would miss the
    past and, in a packed step, see other rows. So every operation on it raises ``UnsupportedError``.
    """

    pages: tuple[PagedAttention, Step, int, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]

    @classmethod
    def mark(
        cls,
        key: torch.Tensor,
        attention: PagedAttention,
        step: Step,
        layer: int,
        mirror: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> PageHandle:
        """Return ``key`` as a handle; no copy. ``mirror``: all of the layer's K and V, where there is one."""
        handle: PageHandle = key.as_subclass(cls)
        handle.pages = (attention, step, layer, key, mirror)
        return handle

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Let shapes be asked for, and nothing else."""
        if func in HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise UnsupportedError(
            f"{getattr(func, '__name__', func)} was called on keys that stand for pages: the model computes "
            "with K before it attends, or its attention implementation was changed while it ran"
        )


def paged_attention_forward(
    own: str,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend over pages when the key is marked, and with the model's ``own`` implementation when it is not.

    ``query`` ``[batch, heads, tokens, head_dim]``; returns ``[batch, tokens, heads, head_dim]`` and, of
    eager code, the weights.
    """
    if (observed := current_observed()) is not None:
        observed.see(module, query, scaling)
    if not isinstance(key, PageHandle):
        if sliding_window is not None and is_reading_pages():  # a mirror, and no mask came
            key, value = key[:, :, -sliding_window:], value[:, :, -sliding_window:]
        if (trace := current_trace()) is not None:
            computed = {name for name in EXTRAS[own] if kwargs.get(name) is not None}
            trace.attended(module, attention_mask, sliding_window, computed)
        if sliding_window is not None:
            kwargs["sliding_window"] = sliding_window
        given = query, key, value, attention_mask
        return attend_itself(own, module, *given, dropout=dropout, scaling=scaling, **kwargs)
    for name in REFUSED:
        if kwargs.get(name) is not None:
            raise UnsupportedError(
                f"{type(module).__name__} attends with {name}, which the paged route does not compute"
            )
    attention, step, layer, plain, mirror = key.pages
    extras = None
    if EXTRAS[own] and not kwargs.keys().isdisjoint(EXTRAS[own]):
        found = Extras(kwargs.get(CAP), kwargs.get(SINKS))
        extras = found if any(each is not None for each in found) else None
    if mirror is None:
        return attention.attend(step, layer, query, plain, value, scaling, sliding_window, extras), None
    with torch.no_grad():
        return decode(step, query, *mirror, scaling, sliding_window, extras), None


def paged_mask(own: str, *args: Any, **kwargs: Any) -> torch.Tensor | None:
    """Return no mask for a paged step, whose rows know their own limits, and the ``own`` one otherwise."""
    if is_reading_pages():
        return None
    mask = MASKS[own](*args, **kwargs)
    if (trace := current_trace()) is not None:
        trace.made(mask, mask_function_of(kwargs))
    return mask
