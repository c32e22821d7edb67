"""A KV cache for PyTorch language models: no token's K and V are computed twice while the budget allows.

This page is the whole public surface. Names are loaded when first used, so that importing the
package costs neither torch nor an event loop.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

from kvhybrid._core import __version__

if TYPE_CHECKING:
    from kvhybrid.cache.kv_cache import KVCache
    from kvhybrid.config import KVCacheConfig
    from kvhybrid.engine.engine import KVEngine
    from kvhybrid.errors import (
        CapacityError,
        ClosedError,
        ConfigError,
        CorruptPageError,
        InvalidRequestError,
        KVHybridError,
        LayoutError,
        OutOfMemoryError,
        OverloadedError,
        TraceError,
        UnsupportedError,
    )
    from kvhybrid.layout import KVLayout
    from kvhybrid.model.attach import attach, detach
    from kvhybrid.presets import CacheStrategy

__all__ = [
    "CacheStrategy",
    "CapacityError",
    "ClosedError",
    "ConfigError",
    "CorruptPageError",
    "InvalidRequestError",
    "KVCache",
    "KVCacheConfig",
    "KVEngine",
    "KVHybridError",
    "KVLayout",
    "LayoutError",
    "OutOfMemoryError",
    "OverloadedError",
    "TraceError",
    "UnsupportedError",
    "__version__",
    "attach",
    "detach",
]

_HOME: Final = {
    "CacheStrategy": "kvhybrid.presets",
    "CapacityError": "kvhybrid.errors",
    "ClosedError": "kvhybrid.errors",
    "ConfigError": "kvhybrid.errors",
    "CorruptPageError": "kvhybrid.errors",
    "InvalidRequestError": "kvhybrid.errors",
    "KVCache": "kvhybrid.cache.kv_cache",
    "KVCacheConfig": "kvhybrid.config",
    "KVEngine": "kvhybrid.engine.engine",
    "KVHybridError": "kvhybrid.errors",
    "KVLayout": "kvhybrid.layout",
    "LayoutError": "kvhybrid.errors",
    "OutOfMemoryError": "kvhybrid.errors",
    "OverloadedError": "kvhybrid.errors",
    "TraceError": "kvhybrid.errors",
    "UnsupportedError": "kvhybrid.errors",
    "attach": "kvhybrid.model.attach",
    "detach": "kvhybrid.model.attach",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
