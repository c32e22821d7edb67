"""What a budget's parts are: pages of full precision, quantized pages, and states beside them.

Knows configuration and layout; no tensors and no devices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from kvhybrid.cache.quantized import record_bytes
from kvhybrid.errors import ConfigError

if TYPE_CHECKING:
    from kvhybrid.config import KVCacheConfig
    from kvhybrid.layout import KVLayout


# The part of ``max_memory_mb`` that states get when no field says otherwise, and how many there is room for
# at least when nothing bounds the bytes.
STATES: Final = 0.25
LEAST_STATES: Final = 16
# The part of the pages' bytes that is of full precision beside quantized pages, and how many such pages there
# are at least: what a text holds while it grows by one, and the copy of a page that it goes on from.
FULL: Final = 0.25
LEAST_FULL: Final = 4


class Shares(NamedTuple):
    """How a budget is divided."""

    num_full: int
    num_quantized: int
    state_bytes: int


def divide(config: KVCacheConfig, layout: KVLayout) -> Shares:
    """Return how many pages of each kind the budget holds, and how many bytes of states beside them.

    States get ``state_memory_mb``; else a quarter of ``max_memory_mb``; else as many bytes as the pages
    take, and room for sixteen at least. With quantization a quarter of the pages' bytes is of full precision.
    Raises ``ConfigError`` when not one page or not one state fits, or not the least that quantization needs.
    """
    budget, share = config.max_memory_mb, config.state_memory_mb
    if not layout.state_bytes:
        if share is not None:
            raise ConfigError(f"state_memory_mb={share}: says nothing, no layer of the model keeps a state")
        return Shares(*_pages(config, layout, budget), 0)
    if share is None and budget is not None:
        share = budget * STATES
    if share is not None and share * 2**20 < layout.state_bytes:
        raise ConfigError(
            f"{share} MiB for states (state_memory_mb={config.state_memory_mb}, max_memory_mb={budget}) hold "
            f"no state of {layout.state_bytes} bytes"
        )
    if share is not None and budget is not None and share >= budget:
        raise ConfigError(f"state_memory_mb={share}: leaves nothing of max_memory_mb={budget} for pages")
    pages = _pages(config, layout, budget - share if budget is not None and share else budget)
    if share is not None:
        return Shares(*pages, int(share * 2**20))
    return Shares(*pages, max(pages_bytes(config, layout, *pages), LEAST_STATES * layout.state_bytes))


def pages_bytes(config: KVCacheConfig, layout: KVLayout, num_full: int, num_quantized: int) -> int:
    """Return the bytes of so many pages, over all layers."""
    bits = config.stored_bits
    record = record_bytes(layout, bits) if bits is not None and num_quantized else 0
    return num_full * layout.bytes_per_page + num_quantized * record


def _pages(config: KVCacheConfig, layout: KVLayout, memory_mb: float | None) -> tuple[int, int]:
    """Return how many pages of full precision, and how many quantized ones, fit into both budgets."""
    if config.stored_bits is None:
        return layout.num_pages(config.max_tokens, memory_mb), 0
    page, record = layout.bytes_per_page, record_bytes(layout, config.stored_bits)
    if record >= page:
        raise ConfigError(
            f"quantization_bits={config.stored_bits}: a page takes {record} bytes then, and {page} without"
        )
    total = config.max_tokens // layout.block_size
    if total <= LEAST_FULL:
        raise ConfigError(
            f"max_tokens={config.max_tokens}: use_quantization needs {LEAST_FULL + 1} pages of "
            f"block_size={layout.block_size}, {(LEAST_FULL + 1) * layout.block_size} tokens"
        )
    # Of all the bytes that so many pages take, a quarter is FULL / page pages, the rest (1 - FULL) / record.
    full = round(total * FULL * record / (FULL * record + (1 - FULL) * page))
    if memory_mb is not None:
        budget, least = int(memory_mb * 2**20), LEAST_FULL * page + record
        if budget < least:
            raise ConfigError(
                f"max_memory_mb={memory_mb:g}: {budget} bytes, and use_quantization needs {least}: "
                f"{LEAST_FULL} pages of {page} bytes and one of {record}"
            )
        full = max(min(full, int(budget * FULL) // page), LEAST_FULL)
        return full, min(total - full, (budget - full * page) // record)
    full = max(full, LEAST_FULL)
    return full, total - full
