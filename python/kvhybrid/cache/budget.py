"""From a budget to pages: how many there are, and whether the devices can hold them.

A budget is a bound, and no memory is paid for before it is used; but one that a device could never hold
would end the process instead of evicting, so it is refused.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from kvhybrid.cache.memory import device_bytes, is_out_of_memory
from kvhybrid.cache.pages import PageStorage
from kvhybrid.cache.quantized import layer_record_bytes
from kvhybrid.cache.shares import divide
from kvhybrid.cache.states import PageStates
from kvhybrid.errors import ConfigError, OutOfMemoryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from kvhybrid.config import KVCacheConfig
    from kvhybrid.layout import KVLayout


def make_storage(
    config: KVCacheConfig,
    layout: KVLayout,
    device: torch.device,
    devices: Sequence[torch.device] | None = None,
) -> PageStorage:
    """Return pages for as many tokens as both budgets of ``config`` allow; ``devices``: one a layer.

    Raises ``ConfigError`` for a budget that holds no page, or whose pages are more than a device has, and
    ``OutOfMemoryError`` when a device has them and does not give them.
    """
    num_full, quantized, state_capacity = divide(config, layout)
    ladder = tuple(zip(quantized, config.ladder, strict=True))
    what = "pages and states" if state_capacity else "pages"
    budget = f"max_tokens={config.max_tokens}, max_memory_mb={config.max_memory_mb}: the {what} take"
    needed: Counter[torch.device] = Counter()
    for index in layout.kept_layers:
        where = devices[index] if devices is not None else device
        needed[where] += num_full * layout.block_size * layout.layer_bytes_per_token(index)
        needed[where] += sum(count * layer_record_bytes(layout, bits, index) for count, bits in ladder)
    if len(needed) == 1:  # of several, nobody knows yet which holds the states
        needed[device if devices is None else next(iter(needed))] += state_capacity
    for where, size in needed.items():
        has = device_bytes(where)
        if has is not None and size > has:
            raise ConfigError(f"{budget} {size / 2**20:.0f} MiB on {where}, which has {has / 2**20:.0f}")
    pin_memory, non_blocking = config.host_copies(device.type)
    try:
        storage = PageStorage(
            layout,
            num_full,
            device,
            devices=devices,
            pin_memory=pin_memory,
            non_blocking=non_blocking,
            quantized=ladder,
        )
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        total = sum(needed.values())
        raise OutOfMemoryError(f"{budget} {total / 2**20:.0f} MiB, and there is no room: {error}") from error
    if layout.state_bytes:
        storage.states = PageStates(state_capacity)
        storage.states.still = storage.still
    return storage
