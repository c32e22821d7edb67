"""What a caller of ``process_kv`` may hand in, judged before anything is stored.

Knows tensors, shapes and positions; no pages, no sessions.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, SupportsIndex

import torch

from kvhybrid.errors import InvalidRequestError, LayoutError
from kvhybrid.layout import DTYPE_BYTES, as_torch_dtype

if TYPE_CHECKING:
    from kvhybrid.cache.pages import PageStorage

DTYPES = tuple(as_torch_dtype(name) for name in DTYPE_BYTES)


def whole_number(name: str, value: object) -> int:
    """Return ``value`` as an integer; raises ``InvalidRequestError`` for flags, fractions and below 0."""
    if isinstance(value, SupportsIndex) and not isinstance(value, bool | torch.Tensor):
        number = operator.index(value)
        if number >= 0:
            return number
    raise InvalidRequestError(f"{name}={value!r}: must be a whole number of at least 0")


def check_slice(storage: PageStorage, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
    """Raise ``LayoutError`` unless K and V ``[batch, num_kv_heads, tokens, width]`` fit the storage.

    Any of the storage dtypes will do, the same for both; the device is the pages'.
    """
    for name, tensor in (("K", key), ("V", value)):
        if not isinstance(tensor, torch.Tensor):
            raise LayoutError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise LayoutError(f"{name} is {tensor.dtype}: must be one of {', '.join(DTYPE_BYTES)}")
        if tensor.layout != torch.strided or tensor.is_nested:
            raise LayoutError(f"{name} must be a dense tensor")
    if key.dtype != value.dtype:
        raise LayoutError(f"K is {key.dtype}, V is {value.dtype}")
    storage.check(layer, key, value)
    device = storage.keys[layer].device
    for name, tensor in (("K", key), ("V", value)):
        if tensor.device != device:
            raise LayoutError(f"layer {layer}: {name} is on {tensor.device}, the pages are on {device}")
    if key.shape[0] != value.shape[0]:
        raise LayoutError(f"K has {key.shape[0]} rows, V has {value.shape[0]}")
    if key.shape[0] == 0 or key.shape[2] == 0:
        raise LayoutError(f"K is {list(key.shape)}: must have at least one row and one token")


def read_start(cache_position: torch.Tensor | SupportsIndex | None, tokens: int) -> int | None:
    """Return where a slice of ``tokens`` positions begins; None: behind what is there.

    Takes an integer, or the consecutive positions as a one-dimensional integer tensor, as ``transformers``
    passes them. Raises ``InvalidRequestError`` for anything else.
    """
    if cache_position is None:
        return None
    if isinstance(cache_position, torch.Tensor):
        return _first_of(cache_position, tokens)
    return whole_number("cache_position", cache_position)


def _first_of(positions: torch.Tensor, tokens: int) -> int:
    if positions.dtype == torch.bool or positions.is_floating_point() or positions.is_complex():
        raise InvalidRequestError(f"cache_position is {positions.dtype}: must be whole numbers")
    if positions.shape != (tokens,):
        raise InvalidRequestError(
            f"cache_position is {list(positions.shape)} for {tokens} tokens: must be one position a token"
        )
    # On the CPU and as Python has them: no wrap-around whatever the integer's width.
    held = positions.detach().to("cpu", torch.int64)
    start = int(held[0])
    if start < 0 or not torch.equal(held, torch.arange(start, start + tokens, device="cpu")):
        raise InvalidRequestError(
            f"cache_position runs from {start} to {int(held[-1])} over {tokens} tokens: must be "
            "consecutive and at least 0"
        )
    return start


def as_stored(name: str, new: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``new`` without its gradient in the storage dtype.

    Raises ``InvalidRequestError`` for what no attention survives: a NaN or an infinity, or a number that
    becomes one in the storage dtype. It would spoil every later token that sees it.
    """
    stored = new.detach().to(dtype)
    if bool(torch.isfinite(stored).all()):
        return stored
    if stored.dtype != new.dtype and bool(torch.isfinite(new).all()):
        largest = new.detach().abs().max().item()
        raise InvalidRequestError(f"{name} holds {largest:g}: too large for {dtype} pages")
    raise InvalidRequestError(f"{name} holds a NaN or an infinity")
