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
# The parts of the pages' bytes by class: of full precision and one of records, or two of them. Full precision
# is for what runs and what was used last. 8 bits cost answers next to nothing, and hold what may well come
# back; half of the bytes at 4 bits buy most of the pages, for there two take the room of one above.
PARTS: Final = {1: (0.25, 0.75), 2: (0.25, 0.25, 0.5)}
# How many pages there are of each class at least. Of full precision: what a text holds while it grows by one,
# and the copy of a page that it goes on from; of the class below, as many as one step may want of it.
LEAST: Final = {1: (4, 1), 2: (4, 2, 1)}


class Shares(NamedTuple):
    """How a budget is divided."""

    num_full: int
    quantized: tuple[int, ...]
    """Pages of each class of records, in the order of ``KVCacheConfig.ladder``."""
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


def pages_bytes(config: KVCacheConfig, layout: KVLayout, num_full: int, quantized: tuple[int, ...]) -> int:
    """Return the bytes of so many pages, over all layers."""
    records = zip(quantized, config.ladder, strict=True)
    own = sum(count * record_bytes(layout, bits) for count, bits in records)
    return num_full * layout.bytes_per_page + own


def _pages(config: KVCacheConfig, layout: KVLayout, memory_mb: float | None) -> tuple[int, tuple[int, ...]]:
    """Return how many pages of full precision and of each class of records fit into both budgets."""
    if not config.ladder:
        return layout.num_pages(config.max_tokens, memory_mb), ()
    sizes = [layout.bytes_per_page, *(record_bytes(layout, bits) for bits in config.ladder)]
    for bits, before, size in zip(config.ladder, sizes, sizes[1:], strict=False):
        if size >= before:
            raise ConfigError(
                f"quantization_bits={config.quantization_bits}: a page takes {size} bytes in {bits} bits, "
                f"and {before} before"
            )
    parts, least = PARTS[len(config.ladder)], LEAST[len(config.ladder)]
    total = config.max_tokens // layout.block_size
    if total < sum(least):
        raise ConfigError(
            f"max_tokens={config.max_tokens}: use_quantization needs {sum(least)} pages of "
            f"block_size={layout.block_size}, {sum(least) * layout.block_size} tokens"
        )
    # Of all the bytes that so many pages take, each class has its part: so many of it.
    each = [part / size for part, size in zip(parts, sizes, strict=True)]
    counts = [round(total * share / sum(each)) for share in each]
    if memory_mb is None:
        return _at_least(total, counts, least)
    budget, needed = int(memory_mb * 2**20), sum(n * size for n, size in zip(least, sizes, strict=True))
    if budget < needed:
        raise ConfigError(
            f"max_memory_mb={memory_mb:g}: {budget} bytes, and use_quantization needs {needed}: "
            + " and ".join(f"{n} pages of {size} bytes" for n, size in zip(least, sizes, strict=True))
        )
    counts = [min(n, int(budget * part) // size) for n, part, size in zip(counts, parts, sizes, strict=True)]
    num_full, above = _at_least(total, counts, least)
    left, fitting = budget - num_full * sizes[0], list[int]()
    for index, size in enumerate(sizes[1:], 1):
        kept = sum(n * s for n, s in zip(least[index + 1 :], sizes[index + 1 :], strict=True))
        fitting.append(min(above[index - 1], (left - kept) // size))
        left -= fitting[-1] * size
    return num_full, tuple(fitting)


def _at_least(total: int, counts: list[int], least: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Return ``counts`` raised to what is needed at least, the last one whatever is left of ``total``."""
    found = [max(n, few) for n, few in zip(counts, least, strict=True)][:-1]
    # Where the last class would have too little left, the one above gives.
    found[-1] = min(found[-1], total - sum(found[:-1]) - least[-1])
    return found[0], (*found[1:], total - sum(found))
