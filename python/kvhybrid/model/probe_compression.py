"""Whether a model can do without tokens in the middle of its text, found by running it.

A text's tokens are removed, and those that follow must get the logits that the model itself gives when a mask
hides the same tokens: positions counted from what is stored, or biases as long as the text, show here.
Windows are refused by what the configuration says: they are longer than any probe's text.
"""

from __future__ import annotations

import inspect
import itertools
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from transformers.cache_utils import DynamicCache

from kvhybrid.cache.compress.selection import RECENT, SINKS, kept_tokens
from kvhybrid.cache.measured import in_evaluation, input_device
from kvhybrid.cache.memory import is_out_of_memory
from kvhybrid.model.attention import PagedAttention
from kvhybrid.model.attention_name import StandIn
from kvhybrid.model.compression import Compression
from kvhybrid.model.padding import vocab_size
from kvhybrid.model.routes import MaterialisedReader, PagedReader, Route
from kvhybrid.model.session_compression import compress
from kvhybrid.model.session_rows import SessionRows
from kvhybrid.model.stepping import Stepping
from kvhybrid.model.transformers_cache import PagedSession
from kvhybrid.model.versions import over
from kvhybrid.presets import CompressionScorer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from kvhybrid.cache.kv_cache import KVCache
    from kvhybrid.layout import KVLayout
    from kvhybrid.model.rows import Text

# Columns: a text that is compressed, several tokens behind it, and one.
STEPS: Final = (RECENT + 24, 5, 1)
KEPT: Final = 0.5
# What configurations call a window. With ``layer_types`` these may belong to layers that there are none of.
WINDOWS: Final = (
    "sliding_window",
    "attention_chunk_size",
    "attention_window",
    "window_size",
    "local_window_size",
)


def obstacle_to_compression(
    model: PreTrainedModel, forward: Callable[..., Any], layout: KVLayout, route: Route
) -> str | None:
    """Return why sessions of ``model`` cannot be compressed, or None.

    ``forward``: the model's own, without our wrapper.
    """
    if layout.state_bytes:
        return "layers keep a state, which stands for all tokens"
    if (window := _window(model)) is not None:
        return f"{window}: a window is counted in tokens, and some would be missing"
    with in_evaluation(model):
        return _try(model, forward, layout, route)


def _window(model: PreTrainedModel) -> str | None:
    """Return what the configuration says of windows, or None when every layer sees the whole text."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds:
        other = sorted(set(kinds) - {"full_attention"})
        return f"layers of type {', '.join(other)}" if other else None
    found = [(name, getattr(config, name, None)) for name in WINDOWS]
    return next((f"{name}={value}" for name, value in found if isinstance(value, int) and value > 0), None)


def _try(model: PreTrainedModel, forward: Callable[..., Any], layout: KVLayout, route: Route) -> str | None:
    """Compress a text and go on; return what is wrong with what follows, if anything."""
    from kvhybrid.model.probe import difference, reason, trial_cache

    total = sum(STEPS)
    ids = ((torch.arange(total, device="cpu") * 7 + 3) % vocab_size(model))[None].to(input_device(model))
    takes = list(inspect.signature(forward).parameters)
    try:
        expected = _logits(forward, takes, DynamicCache(config=model.config), ids, hidden=True)
        cache = trial_cache(model, layout, [total] * 3)
        session = _session(cache, route, vocab_size(model))
        stand_in = StandIn(model) if route is Route.PAGED else None
        stepping = Stepping(forward, takes, nullcontext, stand_in)

        def step(**call: Any) -> Any:
            return stepping.run(session, call)

        _logits(step, takes, session, ids, steps=slice(1))
        compress(session.rows, KEPT, CompressionScorer.STREAMING)
        found = _logits(step, takes, session, ids, steps=slice(1, None))
    except Exception as error:  # whatever a model raises, it is the obstacle
        if is_out_of_memory(error):
            raise
        return reason(error)
    problem = difference(found, expected, layout)
    return f"without tokens in the middle {problem}" if problem is not None else None


def _session(cache: KVCache, route: Route, num_ids: int) -> PagedSession:
    """Return a session without an attachment: the model may have one already, of another cache."""
    storage = cache.storage
    reader = PagedReader(PagedAttention(storage)) if route is Route.PAGED else MaterialisedReader(storage)
    rows = SessionRows(cache, reader, _SameWeights(), vocab_size=lambda: num_ids, name="probe")
    compression = Compression(cache.config, sees_queries=False, obstacle=lambda: None)
    return PagedSession(rows, lambda _: _session(cache, route, num_ids), str, compression)


class _SameWeights:
    """The model does not change while it is tried."""

    def namespace(self, *parts: str, texts: Sequence[Text] = ()) -> int:
        del parts, texts
        return 0

    def follow(self, other: Self) -> None:
        del other

    def is_stale(self) -> bool:
        return False


def _logits(
    forward: Callable[..., Any],
    takes: list[str],
    cache: Any,
    ids: torch.Tensor,
    *,
    steps: slice = slice(None),
    hidden: bool = False,
) -> torch.Tensor:
    """Feed these steps of ``ids``; return the logits of all but the text's own, ``[1, tokens, vocab]``.

    ``hidden``: behind the text, a mask hides what compression by recency removes.
    """
    removed = STEPS[0] - kept_tokens(STEPS[0], KEPT)
    stops = list(itertools.accumulate(STEPS))
    kept = [torch.empty(0, device="cpu")]
    for stop, width in list(zip(stops, STEPS, strict=True))[steps]:
        start = stop - width
        mask = torch.ones_like(ids[:, :stop])
        if hidden and start:
            mask[:, SINKS : SINKS + removed] = 0
        positions = torch.arange(start, stop, device=ids.device)[None]
        output = forward(
            input_ids=ids[:, start:stop],
            attention_mask=mask,
            **over(cache),
            use_cache=True,
            **({"position_ids": positions} if "position_ids" in takes else {}),
        )
        if start:
            kept.append(output.logits.float())
    return torch.cat(kept[1:] or kept, dim=1 if kept[1:] else 0)
