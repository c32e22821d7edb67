"""The shape of cached K and V: how many layers, heads and bytes a token takes.

Knows a model's configuration by attribute names alone; imports neither torch nor transformers.
"""

from dataclasses import dataclass, fields
from hashlib import sha256
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, Self

from kvhybrid.errors import ConfigError, LayoutError
from kvhybrid.model_shape import read_model_shape

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPE_BYTES", "KVLayout", "as_torch_dtype", "dtype_name"]

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
class KVLayout:
    """Shape and dtype of one model's K and V, cut into pages of ``block_size`` tokens.

    A page holds, for every layer, ``[num_kv_heads, block_size, head_dim]`` keys and
    ``[num_kv_heads, block_size, value_head_dim]`` values. ``value_head_dim`` defaults to ``head_dim``.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int = 0
    dtype: str = "float32"
    block_size: int = 64

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "dtype", dtype_name(self.dtype))
        except ValueError as error:
            raise LayoutError(str(error)) from None
        if self.value_head_dim == 0:
            object.__setattr__(self, "value_head_dim", self.head_dim)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "dtype" and (type(value) is not int or value < 1):
                raise LayoutError(f"{field.name}={value!r}: must be an integer of at least 1")
        if self.block_size > MAX_BLOCK_SIZE or self.block_size & (self.block_size - 1):
            raise LayoutError(
                f"block_size={self.block_size}: must be a power of two from 1 to {MAX_BLOCK_SIZE}"
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

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V that one token takes over all layers."""
        per_head = (self.head_dim + self.value_head_dim) * DTYPE_BYTES[self.dtype]
        return self.num_layers * self.num_kv_heads * per_head

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all layers."""
        return self.block_size * self.bytes_per_token

    @property
    def fingerprint(self) -> str:
        """A digest that is equal exactly when two layouts are, on every machine and in every version."""
        text = ",".join(f"{field.name}={getattr(self, field.name)}" for field in fields(self))
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
