"""The probe: which route serves this model, found by running it on a few tokens.

Both routes are tried against the model's own cache, on a left-padded batch, over a prefill, a step of
several tokens and a step of one: a model that touches K and V between cache and attention, or whose
attention needs more than we compute, shows here and not in a user's text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.config import KVCacheConfig
from kvhybrid.errors import LayoutError, UnsupportedError
from kvhybrid.model.interface import own_implementation
from kvhybrid.model.padding import vocab_size
from kvhybrid.model.routes import Route

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from kvhybrid.layout import KVLayout

# Columns of the probe's forward passes: a prefill, several tokens behind it, then one.
STEPS = (11, 5, 1)
PADDING = 3
# Rotary embeddings that change with the length of the text, and with them the keys of the same tokens.
REGIMES = ("dynamic", "longrope")
# Largest difference of logits, as a share of their spread, that summing in another order explains.
TOLERANCE = {"float32": 2e-3, "float16": 4e-2, "bfloat16": 8e-2}


def choose_route(model: PreTrainedModel, layout: KVLayout) -> tuple[Route, str]:
    """Return the fastest route that gives the model's own logits, and why it was chosen.

    Raises ``UnsupportedError`` with both reasons when neither does.
    """
    refuse(model)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _choose(model, layout)
    finally:
        model.train(was_training)


def refuse(model: PreTrainedModel) -> None:
    """Raise ``UnsupportedError`` for kinds of model whose state is not K and V of one text."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedError(f"{name} is an encoder-decoder model: only decoders are served")
    if (kind := _rope_type(model.config.get_text_config())) in REGIMES:
        raise UnsupportedError(
            f"{name} rotates keys by {kind!r}, which depends on a text's whole length: K of one text cannot "
            "serve another"
        )
    if getattr(model, "_is_stateful", False):
        raise UnsupportedError(
            f"{name} keeps a recurrent state, which is not K and V: it cannot be cached in pages"
        )


def _rope_type(config: Any) -> str | None:
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [found, *found.values()]  # some models have one by layer type
    types = [kind.get("rope_type", kind.get("type")) for kind in kinds if isinstance(kind, dict)]
    return next((kind for kind in types if kind in REGIMES), None)


def _choose(model: PreTrainedModel, layout: KVLayout) -> tuple[Route, str]:
    expected = _logits(model, DynamicCache(config=model.config))
    implementation = own_implementation(model)
    if implementation == "sdpa":
        problem = _try(model, layout, Route.PAGED, expected)
        if problem is None:
            return Route.PAGED, "attention over pages gives the model's own logits"
    else:
        problem = f"its attention implementation is {implementation!r}, the paged route replaces 'sdpa'"
    worse = _try(model, layout, Route.MATERIALISED, expected)
    if worse is None:
        return Route.MATERIALISED, problem
    raise UnsupportedError(f"{type(model).__name__}: paged: {problem}; materialised: {worse}")


def _try(model: PreTrainedModel, layout: KVLayout, route: Route, expected: torch.Tensor) -> str | None:
    """Run the probe over ``route``; return what is wrong with it, or None."""
    from kvhybrid.model.attach import Attachment

    needed = 2 * layout.block_size * -(-sum(STEPS) // layout.block_size)
    config = KVCacheConfig(
        max_tokens=needed,
        max_memory_mb=None,
        block_size=layout.block_size,
        dtype=layout.dtype,
        _env_file=None,
    )
    cache = KVCache(config, layout=layout, device=model.device)
    attachment = Attachment(model, cache, route, "probe").install()
    try:
        found = _logits(model, cache.session("probe"))
    except (LayoutError, UnsupportedError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        attachment.detach()
    return difference(found, expected, layout)


def difference(found: torch.Tensor, expected: torch.Tensor, layout: KVLayout) -> str | None:
    """Return by how much logits differ when that is more than another order of summing explains, or None."""
    allowed = TOLERANCE[layout.dtype] * float(expected.std())
    off = float((found - expected).abs().max())
    # Not "off > allowed": NaN must be a difference, too.
    return None if off <= allowed else f"logits differ by {off:.2g}, {allowed:.2g} is allowed"


def _logits(model: PreTrainedModel, cache: Cache) -> torch.Tensor:
    """Run the probe's text through ``model`` and return the real tokens' logits, ``[tokens, vocab]``."""
    total = sum(STEPS)
    vocab = vocab_size(model)
    ids = ((torch.arange(2 * total) * 7 + 3) % vocab).view(2, total).to(model.device)
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    kept, done = [], 0
    forward: Callable[..., object] = model
    for width in STEPS:
        stop = done + width
        output = forward(
            input_ids=ids[:, done:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, done:stop],
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits.float()  # type: ignore[attr-defined]  # a ModelOutput, whatever the model
        kept.append(logits[mask[:, done:stop].bool()])
        done = stop
    return torch.cat(kept)
