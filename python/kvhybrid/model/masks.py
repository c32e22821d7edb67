"""What a model lets its tokens see, at any length: asked of its mask functions, not tried on a long text.

The paged route builds no masks: a token sees itself and what is before it, or the last ``sliding_window``
of that. A model that hides anything else, chunks of a text for one, shows no difference on a short text
and would be wrong on a long one. So before that route is taken the model runs once, on torch's own
attention, and every layer's mask is traced back to the function that it was made from.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from kvhybrid.cache.measured import input_device
from kvhybrid.model.padding import vocab_size

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from transformers import PreTrainedModel

# Longer than any window or chunk in use; the second, because chunks begin at multiples and windows do not.
FAR = (2**19 + 5, 2**19 + 5 + 3331)
# The text that is run, and the padding before its second row: without it masks are left out.
TOKENS, PADDING = 7, 3

_thread = threading.local()


class UnknownMaskError(Exception):
    """A mask function hides something else than what is later, or further back than a window."""


def window_of(mask_function: Callable[..., torch.Tensor]) -> int | None:
    """Return the window of a mask function of transformers, or None when it shows the whole past.

    ``mask_function(batch, head, query, key)``, index tensors, is true where the query sees the key. A
    window of ``w`` shows the query itself and the ``w - 1`` before it. Raises ``UnknownMaskError`` for
    functions that hide anything else.
    """
    windows = [_seen(mask_function, query) for query in FAR]
    if windows[0] == windows[1]:
        return windows[0]
    if windows == [query + 1 for query in FAR]:
        return None
    raise UnknownMaskError("what a token sees depends on its place in the text")


def _seen(mask_function: Callable[..., torch.Tensor], query: int) -> int:
    """Return how many tokens that ``query`` sees; they must be it and those right before it."""
    keys = torch.arange(query + 64, device="cpu")
    zero = torch.zeros((), dtype=torch.long, device="cpu")
    try:
        seen = torch.broadcast_to(
            mask_function(zero, zero, torch.tensor(query, device="cpu"), keys), keys.shape
        )
    except Exception as error:  # the function is the model's own, and may look things up by index
        raise UnknownMaskError(f"its mask function: {type(error).__name__}: {error}") from error
    count = int(seen.sum())
    if count == 0 or not bool(seen[query + 1 - count : query + 1].all()):
        raise UnknownMaskError("a token does not see itself and what is right before it")
    return count


class MaskTrace:
    """Every layer's mask during one forward pass, and the function that it came from."""

    def __init__(self) -> None:
        self._masks: list[tuple[torch.Tensor, Callable[..., torch.Tensor]]] = []
        self._windows: dict[int, int | UnknownMaskError | None] = {}
        self.problems: list[str] = []
        self.num_calls = 0
        self.extras: set[str] = set()
        """What layers attend with that torch's own attention does not compute."""

    def made(self, mask: torch.Tensor | None, mask_function: Callable[..., torch.Tensor] | None) -> None:
        """Note a mask that was made by ``mask_function``."""
        if mask is not None and mask_function is not None:
            self._masks.append((mask, mask_function))

    def attended(
        self,
        module: torch.nn.Module,
        mask: torch.Tensor | None,
        window: int | None,
        extras: Iterable[str] = (),
    ) -> None:
        """Note a call of the attention function with ``mask``, told of ``window`` and ``extras``."""
        self.extras.update(extras)
        layer = getattr(module, "layer_idx", self.num_calls)
        self.num_calls += 1
        if (problem := self._problem(mask, window)) is not None:
            self.problems.append(f"layer {layer}: {problem}")

    def _problem(self, mask: torch.Tensor | None, window: int | None) -> str | None:
        if mask is None:
            return "it attends without the mask of a padded text"
        place = mask.untyped_storage().data_ptr()
        for index, (made, mask_function) in enumerate(self._masks):
            if made.untyped_storage().data_ptr() == place:  # the same, or a view of it
                if index not in self._windows:
                    try:
                        self._windows[index] = window_of(mask_function)
                    except UnknownMaskError as error:
                        self._windows[index] = error
                found = self._windows[index]
                break
        else:
            return "it attends under a mask that it made itself"
        if isinstance(found, UnknownMaskError):
            return str(found)
        told = window if window is not None and window <= min(FAR) else None
        if found != told:
            return f"its mask has a window of {found}, its attention is told of {told}"
        return None


def current_trace() -> MaskTrace | None:
    """Return the trace that this thread's forward pass is noted in, if any."""
    trace: MaskTrace | None = getattr(_thread, "trace", None)
    return trace


@contextmanager
def _tracing() -> Iterator[MaskTrace]:
    trace = _thread.trace = MaskTrace()
    try:
        yield trace
    finally:
        _thread.trace = None


def obstacle_to_pages(model: PreTrainedModel, needed: str | None = None) -> str | None:
    """Return what some layer of ``model`` sees that the paged route would not give it, or None.

    The model must attend through us (``StandIn``); nothing is read from pages. ``needed``: the answer for
    a model without soft caps and sinks.
    """
    device = input_device(model)
    ids = (torch.arange(2 * TOKENS, device="cpu") % vocab_size(model)).view(2, TOKENS)
    mask = torch.ones_like(ids)
    mask[1, :PADDING] = 0
    inputs: dict[str, Any] = {"input_ids": ids.to(device), "attention_mask": mask.to(device)}
    with _tracing() as trace:
        try:
            model(**inputs, use_cache=False)
        except Exception as error:  # noqa: BLE001  # whatever a model raises, it is the obstacle
            return f"{type(error).__name__}: {error}"
    if trace.num_calls == 0:
        return "it does not attend through transformers' attention interface"
    if needed is not None and not trace.extras:
        return needed
    return trace.problems[0] if trace.problems else None
