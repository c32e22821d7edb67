"""States of layers that keep one instead of K and V, as they were behind full pages.

A state holds a whole text, so it can be gone on from at the very place where it was taken, and nowhere
else. It is found by the page that ends at that place: whoever has pinned the page holds the text that
leads up to it. A page that is written is another text's from then on, and its state is dropped before.
Knows tensors and page ids, no model.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    import torch

    State: TypeAlias = tuple[torch.Tensor | None, ...]
    """One text's state: the tensors of all layers in order, without a batch dimension; None where a layer
    keeps none. Never written."""


class _Kept(NamedTuple):
    state: State
    num_bytes: int


class PageStates:
    """States by page, within ``capacity_bytes``; the one used longest ago leaves first."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._kept: dict[int, _Kept] = {}  # in order of use
        self._used_bytes = 0
        self._evicted = 0
        self._restored = 0
        self._lock = threading.RLock()
        self.still: AbstractContextManager[object] = nullcontext()
        """The storage's: held from looking up a page until its state is put or taken."""

    def __contains__(self, page: int) -> bool:
        return page in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def used_bytes(self) -> int:
        """Bytes of all states held."""
        return self._used_bytes

    def put(self, page: int, state: State) -> None:
        """Keep ``state``, which must not be written from now on; a no-op when it exceeds the bound alone."""
        num_bytes = sum(part.numel() * part.element_size() for part in state if part is not None)
        with self._lock:
            self._drop(page)
            if num_bytes > self.capacity_bytes:
                return
            # Room is made first: the bound holds at every instant.
            while self._used_bytes + num_bytes > self.capacity_bytes:
                self._drop(next(iter(self._kept)))
                self._evicted += 1
            self._kept[page] = _Kept(state, num_bytes)
            self._used_bytes += num_bytes

    def get(self, page: int) -> State | None:
        """Return the state behind ``page``, which the caller holds pinned, or None."""
        with self._lock:
            kept = self._kept.pop(page, None)
            if kept is None:
                return None
            self._kept[page] = kept
            self._restored += 1
            return kept.state

    def touch(self, page: int) -> bool:
        """Count as used just now; True when there is a state behind ``page``."""
        with self._lock:
            kept = self._kept.pop(page, None)
            if kept is not None:
                self._kept[page] = kept
            return kept is not None

    def drop(self, pages: Iterable[int]) -> None:
        """Forget the states behind pages that are about to be written, or that are not worth keeping."""
        if not self._kept:
            return
        with self._lock:
            for page in pages:
                self._drop(page)

    def move(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Keep behind each ``(source, destination)`` page's destination what is kept behind its source."""
        if not self._kept:
            return
        with self._lock:
            for source, destination in pairs:
                self._drop(destination)
                if (kept := self._kept.pop(source, None)) is not None:
                    self._kept[destination] = kept

    def clear(self) -> None:
        """Forget every state."""
        with self._lock:
            self._kept.clear()
            self._used_bytes = 0

    def _drop(self, page: int) -> None:
        kept = self._kept.pop(page, None)
        if kept is not None:
            self._used_bytes -= kept.num_bytes

    def statistics(self) -> dict[str, int]:
        """Return counters, O(1): states held, their bytes and bound, how many left early and were used."""
        return {
            "states": len(self._kept),
            "state_bytes": self._used_bytes,
            "state_capacity_bytes": self.capacity_bytes,
            "evicted_states": self._evicted,
            "restored_states": self._restored,
        }
