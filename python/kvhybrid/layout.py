"""The shape of cached K and V: how many layers, heads and bytes a token takes.

Knows a model's configuration by attribute names alone; imports neither torch nor transformers.
"""

from dataclasses import astuple, dataclass, fields
from functools import cached_property
from hashlib import sha256
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Self

from kvhybrid.errors import ConfigError, LayoutError
from kvhybrid.model_shape import read_model_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["DTYPE_BYTES", "KVLayout", "LayerShape", "as_torch_dtype", "dtype_name"]

DTYPE_BYTES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
MAX_BLOCK_SIZE: Final = 1024


def dtype_name(dtype: object) -> str:
    """Return the name of a storage dtype given as ``torch.float16``, "torch.float16" or "float16".

    Raises ``ValueError`` when it is not one of ``DTYPE_BYTES``.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_BYTES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPE_BYTES)}")
    return name


def as_torch_dtype(name: str) -> "torch.dtype":
    """Return the torch dtype of that name; imports torch."""
    dtype: torch.dtype = getattr(import_module("torch"), name)
    return dtype


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Heads and widths of one layer's K and V."""

    num_kv_heads: int
    head_dim: int
    value_head_dim: int

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_positive(field.name, getattr(self, field.name))

    @property
    def numbers_per_token(self) -> int:
        """Numbers, of the storage dtype, that one token takes in this layer."""
        return self.num_kv_heads * (self.head_dim + self.value_head_dim)


def _check_positive(name: str, value: object) -> None:
    if type(value) is not int or value < 1:
        raise LayoutError(f"{name}={value!r}: must be an integer of at least 1")


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """Shape and dtype of one model's K and V, cut into pages of ``block_size`` tokens.

    A page holds, for every layer, ``[num_kv_heads, block_size, head_dim]`` keys and
    ``[num_kv_heads, block_size, value_head_dim]`` values. ``value_head_dim`` defaults to ``head_dim``.
    Where layers differ from each other (``of_layers``) these three are 0 and ``shapes`` has them.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int = 0
    dtype: str = "float32"
    block_size: int = 64
    shapes: tuple[LayerShape | None, ...] = ()
    """One a layer, None for layers that keep no K and V; empty while all layers are alike."""
    state_bytes: int = 0
    """Bytes that layers keep of a whole text, however long, instead of K and V or beside them."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "dtype", dtype_name(self.dtype))
        except ValueError as error:
            raise LayoutError(str(error)) from None
        _check_positive("num_layers", self.num_layers)
        _check_positive("block_size", self.block_size)
        if type(self.state_bytes) is not int or self.state_bytes < 0:
            raise LayoutError(f"state_bytes={self.state_bytes!r}: must be an integer of at least 0")
        if self.shapes:
            self._check_shapes()
        else:
            if self.value_head_dim == 0:
                object.__setattr__(self, "value_head_dim", self.head_dim)
            for name in ("num_kv_heads", "head_dim", "value_head_dim"):
                _check_positive(name, getattr(self, name))
        if self.block_size > MAX_BLOCK_SIZE or self.block_size & (self.block_size - 1):
            raise LayoutError(
                f"block_size={self.block_size}: must be a power of two from 1 to {MAX_BLOCK_SIZE}"
            )

    def _check_shapes(self) -> None:
        # One way to write every layout, or equal ones would have two fingerprints.
        if len(self.shapes) != self.num_layers or len(set(self.shapes)) < 2:
            raise LayoutError(
                f"shapes={self.shapes!r}: must be one a layer for num_layers={self.num_layers}, and differ"
            )
        if self.num_kv_heads or self.head_dim or self.value_head_dim:
            raise LayoutError("num_kv_heads, head_dim and value_head_dim must be 0 where layers differ")

    @classmethod
    def of_layers(
        cls,
        shapes: "Sequence[LayerShape | None]",
        *,
        dtype: object = "float32",
        block_size: int = 64,
        state_bytes: int = 0,
    ) -> Self:
        """Return the layout of layers that may differ; None stands for a layer that keeps no K and V.

        Raises ``LayoutError`` when no layer keeps any.
        """
        first = next((shape for shape in shapes if shape is not None), None)
        if first is None:
            raise LayoutError(f"none of the {len(shapes)} layers keeps K and V")
        is_uniform = len(set(shapes)) == 1
        return cls(
            num_layers=len(shapes),
            num_kv_heads=first.num_kv_heads if is_uniform else 0,
            head_dim=first.head_dim if is_uniform else 0,
            value_head_dim=first.value_head_dim if is_uniform else 0,
            dtype=str(dtype),
            block_size=block_size,
            shapes=() if is_uniform else tuple(shapes),
            state_bytes=state_bytes,
        )

    @classmethod
    def from_model_config(cls, config: Any, *, dtype: object = None, block_size: int = 64) -> Self:
        """Read the layout off a transformers configuration.

        ``dtype`` is the storage dtype; ``None`` takes the model's own. Raises ``LayoutError`` naming
        what is missing, and ``UnsupportedError`` for models whose layers do not all keep the same K and V.
        """
        shape = read_model_shape(config)
        return cls(
            num_layers=shape["num_layers"],
            num_kv_heads=shape["num_kv_heads"],
            head_dim=shape["head_dim"],
            value_head_dim=shape["value_head_dim"],
            dtype=str(shape["dtype"] if dtype is None else dtype),
            block_size=block_size,
        )

    @property
    def torch_dtype(self) -> "torch.dtype":
        """The storage dtype as torch's object; imports torch."""
        return as_torch_dtype(self.dtype)

    @cached_property
    def layers(self) -> tuple[LayerShape | None, ...]:
        """The shape of every layer's K and V, None for a layer that keeps none."""
        if self.shapes:
            return self.shapes
        shape = LayerShape(
            num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, value_head_dim=self.value_head_dim
        )
        return (shape,) * self.num_layers

    @cached_property
    def kept_layers(self) -> tuple[int, ...]:
        """The layers that keep K and V."""
        return tuple(index for index, shape in enumerate(self.layers) if shape is not None)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V that one token takes over all layers."""
        return sum(map(self.layer_bytes_per_token, self.kept_layers))

    def layer_bytes_per_token(self, layer: int) -> int:
        """Return the bytes of K and V that one token takes in a layer."""
        shape = self.layers[layer]
        return shape.numbers_per_token * DTYPE_BYTES[self.dtype] if shape is not None else 0

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers."""
        return self.block_size * self.bytes_per_token

    @property
    def fingerprint(self) -> str:
        """A digest that is equal exactly when two layouts are, on every machine and in every version."""
        names = [field.name for field in fields(self) if field.name not in ("shapes", "state_bytes")]
        text = ",".join(f"{name}={getattr(self, name)}" for name in names)
        for index, shape in enumerate(self.shapes):
            kept = "none" if shape is None else ",".join(map(str, astuple(shape)))
            text += f",layer {index}={kept}"
        if self.state_bytes:
            text += f",state_bytes={self.state_bytes}"
        return sha256(f"kvhybrid layout 1: {text}".encode()).hexdigest()[:32]

    def num_pages(self, max_tokens: int, max_memory_mb: float | None = None) -> int:
        """Return how many pages fit into both budgets; neither is ever exceeded.

        Raises ``ConfigError`` when not even one does.
        """
        pages = max_tokens // self.block_size
        if pages < 1:
            raise ConfigError(
                f"max_tokens={max_tokens}: holds no page of block_size={self.block_size} tokens"
            )
        if max_memory_mb is None:
            return pages
        budget = int(max_memory_mb * 2**20)
        if budget < self.bytes_per_page:
            raise ConfigError(
                f"max_memory_mb={max_memory_mb}: {budget} bytes hold no page of {self.bytes_per_page} bytes"
                f" ({self.block_size} tokens of {self.bytes_per_token} bytes)"
            )
        return min(pages, budget // self.bytes_per_page)
