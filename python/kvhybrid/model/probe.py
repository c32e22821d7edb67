"""The probe: which route serves this model, found by running it on a few tokens.

Both routes are tried on a left-padded batch, over a prefill, a step of several tokens and two of one, and
must give what the model gives through its own cache and, in one pass, without any: a model that touches K
and V between cache and attention, whose attention needs more than we compute, or whose own cache changes
its text, shows here and not in a user's.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DynamicCache

from kvhybrid.cache.kv_cache import KVCache
from kvhybrid.cache.measured import in_evaluation, input_device, measure_layers
from kvhybrid.config import KVCacheConfig
from kvhybrid.errors import CapacityError, LayoutError, UnsupportedError
from kvhybrid.model.attention_name import StandIn
from kvhybrid.model.layer_states import state_layers
from kvhybrid.model.masks import obstacle_to_pages
from kvhybrid.model.original import has_compiled_parts
from kvhybrid.model.own_attention import EAGER, OURS
from kvhybrid.model.padding import vocab_size
from kvhybrid.model.probe_calls import plain_logits, written_by
from kvhybrid.model.probe_states import describe_states, logits_alone, refuse_states, resumed_logits
from kvhybrid.model.routes import Route
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from kvhybrid.layout import KVLayout

# Columns of the probe's forward passes: a prefill, several tokens behind it, then one by one.
STEPS = (19, 9, 1, 1)
PADDING = 3
# Tokens a page when states are tried: the text has a block's end to go on from.
STATE_BLOCK = 8
# Rotary embeddings that change with the length of the text, and with them the keys of the same tokens.
REGIMES = ("dynamic", "longrope")
# Largest difference of logits, as a share of their spread, that summing in another order explains.
TOLERANCE = {"float32": 2e-3, "float16": 4e-2, "bfloat16": 8e-2}


@dataclass(frozen=True)
class Trial:
    """What became of one route: the ``difference`` of logits, what is ``allowed``, and what is wrong."""

    route: Route
    difference: float | None
    allowed: float
    problem: str | None


def choose_route(model: PreTrainedModel, layout: KVLayout) -> tuple[Route, str]:
    """Return the fastest route that gives the model's own logits, and why it was chosen.

    Raises ``UnsupportedError`` with both reasons when neither does.
    """
    trials = try_routes(model, layout)
    last = trials[-1]
    if last.problem is None:
        before = [trial.problem for trial in trials[:-1] if trial.problem is not None]
        why = before[0] if before else "attention over pages gives the model's own logits"
        return last.route, why + describe_states(model)
    reasons = "; ".join(f"{trial.route}: {trial.problem}" for trial in trials)
    raise UnsupportedError(f"{type(model).__name__}: {reasons}")


def try_routes(model: PreTrainedModel, layout: KVLayout) -> list[Trial]:
    """Try the routes, the fastest first, up to the first without a problem, and return what was found.

    Raises ``UnsupportedError`` for a model whose own logits are no measure: that cannot be run in steps,
    or is refused for its kind.
    """
    refuse(model)
    with in_evaluation(model):
        return _try_routes(model, layout)


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
    if getattr(model, "_is_stateful", False) and not state_layers(model.config):
        raise UnsupportedError(
            f"{name} keeps a recurrent state, which is not K and V: it cannot be cached in pages"
        )


def _rope_type(config: Any) -> str | None:
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = [found, *found.values()]  # some models have one by layer type
    types = [kind.get("rope_type", kind.get("type")) for kind in kinds if isinstance(kind, dict)]
    return next((kind for kind in types if kind in REGIMES), None)


def own_logits(model: PreTrainedModel, layout: KVLayout) -> torch.Tensor:
    """Return the model's logits of the probe's text through its own cache, zeros for padding.

    Raises ``UnsupportedError`` when it cannot be run so, or when its own cache changes what it says.
    """
    name = type(model).__name__
    try:
        expected = _logits(model, DynamicCache(config=model.config))
        alone = _logits(model, None, (sum(STEPS),))
    except Exception as error:  # whatever a model raises, the reason it is refused is that it does
        raise UnsupportedError(
            f"{name} cannot be run step by step over transformers' DynamicCache: {reason(error)}"
        ) from error
    off = _distance(expected[:, STEPS[0] :], alone[:, STEPS[0] :], layout)
    if not off <= (allowed := allowance(expected, layout)):
        refuse_states(model, f"several tokens behind it do not go on from it, logits differ by {off:.2g}")
        raise UnsupportedError(
            f"{name} gives other logits through its own cache than without one: they differ by {off:.2g}, "
            f"{allowed:.2g} is allowed"
        )
    plain = logits_alone(model, _text(model)[1:])
    if not (off := _distance(alone[1:], plain, layout)) <= allowed:
        raise UnsupportedError(
            f"{name} gives other logits for a text alone than beside a padded one: they differ by {off:.2g}, "
            f"{allowed:.2g} is allowed"
        )
    if layout.state_bytes:
        unpadded = logits_alone(model, _text(model)[:1, PADDING:])
        if not (off := _distance(alone[:1, PADDING:], unpadded, layout)) <= allowed:
            refuse_states(model, f"padding leaves a trace in it, logits differ by {off:.2g}")
    return expected


def _distance(found: torch.Tensor, expected: torch.Tensor, layout: KVLayout) -> float:
    """Return the largest difference of logits ``[rows, tokens, vocab]``, of most tokens at least."""
    differences = (found - expected).abs().amax(-1)
    # In halves another order of summing can send a token to another expert: few tokens of a row then
    # differ by much, and that is no fault of the cache.
    return float(differences.max() if layout.dtype == "float32" else differences.median(-1).values.max())


def _try_routes(model: PreTrainedModel, layout: KVLayout) -> list[Trial]:
    expected = own_logits(model, layout)
    try:
        text = written_by(model, _text(model), _mask(model))
    except Exception:  # noqa: BLE001  # a model that cannot generate has no text to differ from
        text = None
    trials = []
    for route in (Route.PAGED, Route.MATERIALISED):
        problem = obstacle_to_paging(model) if route is Route.PAGED else None
        found = None
        if problem is None:
            found, problem = _try(model, layout, route, expected, text)
        if problem is None and layout.state_bytes:
            problem = _try_states(model, layout, route, expected[1:])
        off = float((found - expected).abs().max()) if isinstance(found, torch.Tensor) else None
        trials.append(Trial(route, off, allowance(expected, layout), problem))
        if problem is None:
            break
    return trials


def obstacle_to_paging(model: PreTrainedModel) -> str | None:
    """Return what keeps a model from attending over pages at any length of text, or None."""
    if has_compiled_parts(model):
        return "parts of it are compiled, and pages cannot be traced"
    implementation = str(model.config._attn_implementation)
    other = f"its attention implementation is {implementation!r}, the paged route replaces 'sdpa'"
    if implementation not in OURS:
        return other
    with StandIn(model).attending(reads_pages=False):
        # Eager code is asked for to see weights, which pages do not give, unless there is no other way.
        return obstacle_to_pages(model, other if implementation == EAGER else None)


def _try(
    model: PreTrainedModel, layout: KVLayout, route: Route, expected: torch.Tensor, text: torch.Tensor | None
) -> tuple[torch.Tensor | None, str | None]:
    """Run the probe over ``route``; return the logits, if any, and what is wrong, if anything."""
    from kvhybrid.model.attach import Attachment

    cache = trial_cache(model, layout, [sum(STEPS)] * 6)
    attachment = Attachment(model, cache, route, "probe").install()
    try:
        found = _logits(model, cache.session("probe"))
        if (problem := difference(found, expected, layout)) is not None:
            return found, problem
        plain = plain_logits(model, _text(model)[1:], cache.session("plain"), STEPS)
        if not (off := _distance(plain, expected[1:], layout)) <= allowance(expected, layout):
            return found, f"logits of a text alone differ by {off:.2g}"
        if text is not None:
            again = written_by(model, _text(model), _mask(model))
            # In halves two tokens may be equally likely.
            if layout.dtype == "float32" and not torch.equal(again, text):
                return found, "generate writes another text for a padded batch"
    except CapacityError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever a model raises, it is the reason not to
        return None, reason(error)
    else:
        return found, None
    finally:
        attachment.detach()


def _try_states(model: PreTrainedModel, layout: KVLayout, route: Route, expected: torch.Tensor) -> str | None:
    """Go on from a state that was put back; return what is wrong with it, or None."""
    from kvhybrid.model.attach import Attachment

    text = _text(model)[1:]
    cache = trial_cache(model, replace(layout, block_size=STATE_BLOCK), [text.shape[1]] * 2)
    with Attachment(model, cache, route, "probe").install():
        found = resumed_logits(model, cache.session("first"), cache.session("second"), text)
    if found is None:
        return "a text run twice found no state to go on from"
    off = _distance(found, expected[:, -found.shape[1] :], layout)
    allowed = allowance(expected, layout)
    return None if off <= allowed else f"behind a state that was put back, logits differ by {off:.2g}"


def trial_cache(model: PreTrainedModel, layout: KVLayout, lengths: Sequence[int]) -> KVCache:
    """Return a cache with room for texts of these lengths, its pages where the model keeps K and V."""
    pages = sum(-(-length // layout.block_size) for length in lengths)
    config = KVCacheConfig(
        max_tokens=pages * layout.block_size,
        max_memory_mb=None,
        state_memory_mb=None,
        block_size=layout.block_size,
        dtype=layout.dtype,
        _env_file=None,
    )
    devices = measure_layers(model).devices
    if len(devices) != layout.num_layers:
        raise LayoutError(
            f"{type(model).__name__} keeps K and V of {len(devices)} layers, the layout has "
            f"{layout.num_layers}"
        )
    return KVCache(config, layout=layout, device=devices[0], devices=devices)


def reason(error: Exception) -> str:
    """Return an error as part of a sentence."""
    return f"{type(error).__name__}: {error}"


def allowance(expected: torch.Tensor, layout: KVLayout) -> float:
    """Return the largest difference of logits that another order of summing explains."""
    return TOLERANCE[layout.dtype] * float(expected.std())


def difference(found: torch.Tensor, expected: torch.Tensor, layout: KVLayout) -> str | None:
    """Return by how much logits differ when that is more than another order of summing explains, or None."""
    allowed = allowance(expected, layout)
    off = float((found - expected).abs().max())
    # Not "off > allowed": NaN must be a difference, too.
    return None if off <= allowed else f"logits differ by {off:.2g}, {allowed:.2g} is allowed"


def _text(model: PreTrainedModel) -> torch.Tensor:
    """Return the probe's text, ``[2, tokens]``."""
    total = sum(STEPS)
    return (
        ((torch.arange(2 * total, device="cpu") * 7 + 3) % vocab_size(model))
        .view(2, total)
        .to(input_device(model))
    )


def _mask(model: PreTrainedModel) -> torch.Tensor:
    """Return the attention mask of the probe's text: its first row begins with padding."""
    mask = torch.ones_like(_text(model))
    mask[0, :PADDING] = 0
    return mask


def _logits(model: PreTrainedModel, cache: Cache | None, steps: tuple[int, ...] = STEPS) -> torch.Tensor:
    """Run the probe's text through ``model``; return its logits ``[2, tokens, vocab]``, zeros for padding."""
    ids, mask = _text(model), _mask(model)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    # Models that count positions themselves (BLOOM) have no such argument.
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    kept, done = [], 0
    forward: Callable[..., object] = model
    for width in steps:
        stop = done + width
        output = forward(
            input_ids=ids[:, done:stop],
            attention_mask=mask[:, :stop],
            **over(cache),
            use_cache=cache is not None,
            **({"position_ids": positions[:, done:stop]} if takes_positions else {}),
        )
        kept.append(output.logits.float())  # type: ignore[attr-defined]  # a ModelOutput, whatever the model
        done = stop
    return torch.cat(kept, dim=1).masked_fill(mask[:, :, None] == 0, 0.0)
