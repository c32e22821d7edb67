"""What memory a device has, what running out of it looks like, and what lies beside the pages.

Knows the operating system and torch's allocators; no pages.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from pathlib import Path
from typing import Final

import torch

from kvhybrid.errors import CapacityError

# Where Linux says how much a container may use: control groups of version 2 and of version 1.
CONTROL_GROUPS: Final = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that pages, the device's memory or the host's have run out."""
    if isinstance(error, CapacityError | MemoryError | torch.OutOfMemoryError):
        return True
    # torch has no class of its own for the host's memory.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


def device_bytes(device: torch.device) -> int | None:
    """Return how many bytes a device has for all its users together; None where nobody says.

    The host: its memory, or what the process's container may use of it.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    found = []
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not on Windows
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for path in CONTROL_GROUPS:
        with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no limit
            found.append(int(path.read_text(encoding="ascii")))
    return min((size for size in found if size > 0), default=None)


class Buffers:
    """Counts the bytes of tensors that are held beside the pages, for as long as they live.

    What attention gathers into and what the materialised route mirrors grows with what runs, not with
    what is cached: it is reported, and no part of the budget.
    """

    def __init__(self) -> None:
        self._held: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}

    def track(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count ``tensor`` until it is gone, and return it."""
        held, key = self._held, id(tensor)
        # No lock: a callback may come at any moment, in any thread, and a dictionary bears it.
        held[key] = weakref.ref(tensor, lambda _: held.pop(key, None)), tensor.untyped_storage().nbytes()
        return tensor

    @property
    def num_bytes(self) -> int:
        """Bytes held now: a sum over buffers, a pair for each thread and each layer of a running mirror."""
        return sum(size for _, size in list(self._held.values()))
