"""Steps of torch's optimizers, told to the states of the models whose weights they write.

Fused optimizers do not count their writes, and may write a few rows of a large weight. torch calls one hook
after every step of every optimizer; it stays in place while any model is watched.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, Final, Protocol

from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch
    from torch.utils.hooks import RemovableHandle


class Watching(Protocol):
    """What is told of a step."""

    def uses(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Return whether one of these tensors is watched."""

    def weights_changed(self) -> None:
        """Take the weights for others from now on."""


_watching: Final[weakref.WeakSet[Watching]] = weakref.WeakSet()
_lock: Final = threading.RLock()
_handle: RemovableHandle | None = None


def watch_optimizers(state: Watching) -> None:
    """Tell ``state`` of every optimizer's step over one of its tensors, for as long as it lives."""
    global _handle  # noqa: PLW0603  # one hook for the process
    with _lock:
        _watching.add(state)
        if _handle is None:
            _handle = register_optimizer_step_post_hook(_stepped)


def unwatch_optimizers(state: Watching) -> None:
    """Tell ``state`` nothing more. The last one takes the hook out of torch."""
    with _lock:
        _watching.discard(state)
        _remove_if_unused()


def _remove_if_unused() -> None:
    global _handle  # noqa: PLW0603  # one hook for the process
    if not len(_watching) and _handle is not None:
        _handle.remove()
        _handle = None


def _stepped(optimizer: Any, *_: object) -> None:
    states = list(_watching)
    if not states:
        with _lock:
            _remove_if_unused()
        return
    # A step writes what has a gradient, and what the optimizer decays.
    written = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for state in states:
        if state.uses(written):
            state.weights_changed()
