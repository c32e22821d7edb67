"""Named starting points for a configuration, and the types of the values that one takes.

Plain data: which of these values this version can honour is for ``kvhybrid.config`` to judge.
"""

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypedDict

if TYPE_CHECKING:
    import torch
    from pydantic import SecretStr

__all__ = ["PRESETS", "SWITCHES", "CacheStrategy", "CompressionScorer", "ConfigValues", "PresetName"]

PresetName = Literal[
    "high_performance", "memory_efficient", "balanced", "high_traffic", "low_latency", "memory_constrained"
]


class CacheStrategy(StrEnum):
    """Who leaves first, and whether pages step down a ladder before they go."""

    LRU = "lru"
    PAGED = "paged"
    ADAPTIVE = "adaptive"


class CompressionScorer(StrEnum):
    """How compression tells which old tokens matter. ``kvhybrid.cache.compress.scorers`` names the papers."""

    STREAMING = "streaming"
    KEYDIFF = "keydiff"
    LAGKV = "lagkv"
    KNORM = "knorm"
    SNAPKV = "snapkv"
    TOVA = "tova"


class ConfigValues(TypedDict, total=False):
    """What ``KVCacheConfig`` takes, before it is validated; it explains each field."""

    max_tokens: int
    max_memory_mb: float | None
    state_memory_mb: float | None
    cache_strategy: "CacheStrategy | Literal['lru', 'paged', 'adaptive']"
    block_size: int
    dtype: "torch.dtype | str | None"
    use_compression: bool
    compression_ratio: float
    compression_scorer: (
        "CompressionScorer | Literal['streaming', 'keydiff', 'lagkv', 'knorm', 'snapkv', 'tova']"
    )
    use_quantization: bool
    quantization_bits: int
    enable_gc: bool
    gc_threshold: float
    enable_prefetch: bool
    prefetch_size: int
    max_pinned_share: float
    pin_memory: bool
    non_blocking: bool
    enable_persistence: bool
    persistence_path: str | Path | None
    reproducible: bool
    num_workers: int
    host_memory_mb: float | None
    disk_gb: float | None
    shared_url: "str | SecretStr | None"
    tenant_isolation: bool


SWITCHES: Final[Mapping[str, str]] = {
    "use_compression": "compression_ratio",
    "use_quantization": "quantization_bits",
    "enable_gc": "gc_threshold",
    "enable_prefetch": "prefetch_size",
    "enable_persistence": "persistence_path",
}
"""Each switch, and the field that says nothing while it is off."""

PRESETS: Final[Mapping[PresetName, ConfigValues]] = {
    "high_performance": {
        "max_tokens": 16384,
        "cache_strategy": CacheStrategy.ADAPTIVE,
        "use_compression": False,
        "dtype": "float16",
        "enable_prefetch": True,
        "prefetch_size": 8,
        "pin_memory": True,
        "non_blocking": True,
    },
    "memory_efficient": {
        "max_tokens": 4096,
        "cache_strategy": CacheStrategy.PAGED,
        "use_compression": True,
        "compression_ratio": 0.2,
        "use_quantization": True,
        "quantization_bits": 4,
        "max_memory_mb": 2048,
        "enable_gc": True,
        "gc_threshold": 0.7,
    },
    "balanced": {
        "max_tokens": 8192,
        "cache_strategy": CacheStrategy.ADAPTIVE,
        "use_compression": True,
        "compression_ratio": 0.3,
        "use_quantization": False,
        "enable_prefetch": True,
        "prefetch_size": 4,
        "enable_persistence": True,
    },
    "high_traffic": {
        "max_tokens": 16384,
        "cache_strategy": CacheStrategy.ADAPTIVE,
        "use_compression": True,
        "compression_ratio": 0.3,
        "enable_prefetch": True,
        "prefetch_size": 16,
        "num_workers": 32,
        "enable_persistence": True,
    },
    "low_latency": {
        "max_tokens": 8192,
        "cache_strategy": CacheStrategy.LRU,
        "use_compression": False,
        "dtype": "float16",
        "enable_prefetch": True,
        "prefetch_size": 8,
        "pin_memory": True,
        "non_blocking": True,
    },
    "memory_constrained": {
        "max_tokens": 2048,
        "cache_strategy": CacheStrategy.PAGED,
        "use_compression": True,
        "compression_ratio": 0.1,
        "use_quantization": True,
        "quantization_bits": 4,
        "max_memory_mb": 1024,
        "enable_gc": True,
        "gc_threshold": 0.6,
    },
}
