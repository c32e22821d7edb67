"""Every error that kvhybrid raises on its own account, under its public name.

Holds no logic. The three that the native core raises are re-exported from it. torch is imported
only when ``OutOfMemoryError`` is asked for, because it is one of torch's errors too.
"""

from typing import TYPE_CHECKING

from kvhybrid._core import CapacityError, ClosedError, KVHybridError

if TYPE_CHECKING:
    import torch

    class OutOfMemoryError(CapacityError, torch.OutOfMemoryError):
        """The device has no room left, even after evicting and trying once more."""


__all__ = [
    "CapacityError",
    "ClosedError",
    "ConfigError",
    "CorruptPageError",
    "InvalidRequestError",
    "KVHybridError",
    "LayoutError",
    "OutOfMemoryError",
    "OverloadedError",
    "TraceError",
    "UnsupportedError",
]


class ConfigError(KVHybridError, ValueError):
    """A configuration field has a value outside its range; the message names field, value and range."""

    __module__ = "kvhybrid"


class CorruptPageError(KVHybridError):
    """Stored bytes are not what was written, or not signed as they should be; nothing of them was used."""

    __module__ = "kvhybrid"


class LayoutError(KVHybridError):
    """Tensors or a model do not have the shape that the cache was laid out for."""

    __module__ = "kvhybrid"


class TraceError(KVHybridError, ValueError):
    """A file is no recorded workload; the message names file and line."""

    __module__ = "kvhybrid"


class UnsupportedError(KVHybridError, NotImplementedError):
    """Something was asked for that this version does not have."""

    __module__ = "kvhybrid"


class InvalidRequestError(KVHybridError, ValueError):
    """A request cannot be served as it is, now or later; nothing was stored."""

    __module__ = "kvhybrid"


class OverloadedError(KVHybridError):
    """The queue is full; ``retry_after`` says in how many seconds there should be room."""

    __module__ = "kvhybrid"

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def _out_of_memory_error() -> type[CapacityError]:
    import torch

    return type(
        "OutOfMemoryError",
        (CapacityError, torch.OutOfMemoryError),
        {
            "__module__": "kvhybrid",
            "__doc__": "The device has no room left, even after evicting and trying once more.",
        },
    )


def __getattr__(name: str) -> object:
    if name == "OutOfMemoryError":
        # Of two threads that ask first, both get the one that came first: there is one such class.
        return globals().setdefault(name, _out_of_memory_error())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
