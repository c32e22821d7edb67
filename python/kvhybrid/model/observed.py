"""``Observed``: the queries of a session's last tokens, as our attention function sees them go by.

What SnapKV and TOVA score by. Kept only where a session asks for it: a copy for each layer and token costs
what it costs.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from kvhybrid.cache.compress.scorers import Queries
from kvhybrid.cache.compress.selection import RECENT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvhybrid.cache.memory import Buffers

_thread = threading.local()


class Observed:
    """Queries of the last ``RECENT`` columns of every layer, or of as many as were computed in a row."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._held: dict[int, list[torch.Tensor]] = {}
        self._scales: dict[int, float] = {}
        self._passing: dict[int, torch.Tensor] = {}

    def see(self, module: torch.nn.Module, query: torch.Tensor, scale: float | None) -> None:
        """Take ``query`` ``[batch, heads, tokens, head_dim]`` of the pass under way."""
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int):
            self._scales[layer] = scale if scale is not None else query.shape[-1] ** -0.5
            self._passing[layer] = self._buffers.track(query.detach()[:, :, -RECENT:].clone())

    def settle(self, *, success: bool) -> None:
        """End the pass: its queries are the last ones, or they never were."""
        passed, self._passing = self._passing, {}
        if not success:
            return
        for layer, query in passed.items():
            held = self._held.setdefault(layer, [])
            held.append(query)
            while sum(each.shape[2] for each in held[1:]) >= RECENT:
                held.pop(0)

    def crop(self, columns: int) -> None:
        """Drop the last ``columns``."""
        for held in self._held.values():
            left = columns
            while held and left >= held[-1].shape[2]:
                left -= held.pop().shape[2]
            if held and left > 0:
                held[-1] = held[-1][:, :, :-left]

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        self._held = {
            layer: [self._buffers.track(each[rows]) for each in held] for layer, held in self._held.items()
        }

    def copy_to(self, other: Observed) -> None:
        """Have ``other`` hold the same."""
        other._held = {layer: list(held) for layer, held in self._held.items()}
        other._scales = dict(self._scales)

    def forget(self) -> None:
        """Drop everything."""
        self._held, self._passing = {}, {}

    def queries(self, layer: int, row: int, tokens: int) -> Queries | None:
        """Return a row's queries of its last tokens, ``tokens`` at most; None when there are none."""
        held = self._held.get(layer)
        if not held:
            return None
        last = torch.cat([each[row : row + 1] for each in held], dim=2)[:, :, -min(tokens, RECENT) :]
        return Queries(last, self._scales[layer])


@contextmanager
def observing(observed: Observed | None) -> Iterator[None]:
    """Have this thread's attention show its queries to ``observed``."""
    before = current_observed()
    _thread.observed = observed
    try:
        yield
    finally:
        _thread.observed = before


def current_observed() -> Observed | None:
    """Return who looks at this thread's queries, if anybody does."""
    observed: Observed | None = getattr(_thread, "observed", None)
    return observed
