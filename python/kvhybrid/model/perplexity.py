"""What a change to cached K and V costs a model: perplexity behind a prefix that was changed.

Of every window of a text the prefix is computed once in full precision; every change gets a copy of what the
layers kept of it, and the rest of the window is scored behind that. Knows
transformers' own cache; refuses to know what a change is: a codec, a compression, somebody else's library.
"""

from __future__ import annotations

import copy
import inspect
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import DynamicCache

from kvhybrid.cache.codec import Codec
from kvhybrid.cache.compress.scorers import NEED_QUERIES, SCORERS
from kvhybrid.cache.compress.selection import choose, gather, kept_tokens
from kvhybrid.cache.measured import layer_kinds
from kvhybrid.errors import InvalidRequestError, UnsupportedError
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from transformers import PreTrainedModel

    from kvhybrid.presets import CompressionScorer

    Pair = tuple[torch.Tensor, torch.Tensor]
    Change = Callable[[torch.Tensor, torch.Tensor], Pair]


class Quality(NamedTuple):
    """How well a text was foretold behind a changed prefix."""

    perplexity: float
    change: float
    """Against full precision, as a fraction: 0.01 is one percent worse."""
    divergence: float
    """Mean Kullback-Leibler divergence from full precision's next tokens, nats."""
    refused_pages: int
    """Pages that the change left in full precision."""
    error: float
    """Standard error of ``change`` over the windows; NaN of a single one."""


class Quantized:
    """The change that a codec makes: every whole page of K and V to records and back.

    What does not fill a page stays as it is, and so does a page that the codec refuses.
    """

    def __init__(self, bits: int, block_size: int = 64) -> None:
        self.codec = Codec(bits)
        self.block_size = block_size
        self.refused_pages = 0

    def __call__(self, key: torch.Tensor, value: torch.Tensor) -> Pair:
        """Return K and V ``[rows, num_kv_heads, tokens, width]`` as they come back."""
        codec = self.codec
        return (
            self._through(key, codec.key_bytes, codec.quantize_keys, codec.dequantize_keys),
            self._through(value, codec.value_bytes, codec.quantize_values, codec.dequantize_values),
        )

    def _through(
        self,
        tensor: torch.Tensor,
        size: Callable[[int, int], int],
        quantize: Callable[[torch.Tensor, None, torch.Tensor, None], torch.Tensor],
        dequantize: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None],
    ) -> torch.Tensor:
        rows, heads, tokens, width = tensor.shape
        count, block = tokens // self.block_size, self.block_size
        whole = tensor[:, :, : count * block].unflatten(2, (count, block)).transpose(1, 2)
        pages = whole.flatten(0, 1).contiguous()
        records = torch.empty(
            rows * count, heads, size(width, block), dtype=torch.uint8, device=tensor.device
        )
        accepted = quantize(pages, None, records, None).nonzero().flatten()
        dequantize(records, accepted, pages, accepted)
        self.refused_pages += len(pages) - len(accepted)
        back = pages.unflatten(0, (rows, count)).transpose(1, 2).flatten(2, 3)
        return torch.cat((back, tensor[:, :, count * block :]), 2)


class Compressed:
    """The change that a scorer of K and V alone makes: the share ``kept`` of the old tokens stays."""

    def __init__(self, scorer: CompressionScorer, kept: float) -> None:
        if scorer in NEED_QUERIES:
            raise UnsupportedError(f"{scorer} looks at queries, which a cache does not have")
        self.scorer = scorer
        self.kept = kept

    def __call__(self, key: torch.Tensor, value: torch.Tensor) -> Pair:
        """Return the tokens of K and V ``[rows, num_kv_heads, tokens, width]`` that stay, by head."""
        scores = SCORERS[self.scorer](key.float(), value.float(), None)
        places = choose(scores, kept_tokens(key.shape[2], self.kept))
        return gather(key, places), gather(value, places)


@torch.inference_mode()
def measure_quality(
    model: PreTrainedModel,
    ids: torch.Tensor,
    changes: Mapping[str, Change],
    *,
    prefix: int = 768,
    scored: int = 256,
    windows: int | None = None,
    batch_size: int = 4,
    tick: Callable[[], object] = lambda: None,
) -> dict[str, Quality]:
    """Return what each change costs, by its name; without one, ``"full precision"``.

    ``ids``: int64 ``[tokens]``. Windows of ``prefix + scored + 1`` begin every ``scored`` tokens, at most
    ``windows`` of them, and all that lies behind the prefix and one more token is scored: no token twice.
    ``tick`` is called after each batch of ``batch_size``.

    Raises ``InvalidRequestError`` when the text has not one window, ``UnsupportedError`` for a model that
    keeps no K and V in transformers' cache.
    """
    length = prefix + scored + 1
    if len(ids) < length:
        raise InvalidRequestError(f"the text has {len(ids)} tokens, and a window takes {length}")
    rows = ids.unfold(0, length, scored)[:windows]
    nats: dict[str, list[torch.Tensor]] = {name: [] for name in ("full precision", *changes)}
    divergence = dict.fromkeys(changes, 0.0)
    for batch in rows.split(batch_size):
        kept = _prefilled(model, batch[:, :prefix])
        targets = batch[:, prefix + 1 :].to(kept.device)
        truth = None
        # Behind fewer tokens than there were, a model could only guess them.
        positions = (
            {"position_ids": torch.arange(prefix, length - 1, device=kept.device)[None]}
            if _takes_positions(model)
            else {}
        )
        for name, change in ("full precision", None), *changes.items():
            cache = _changed(kept.cache, change)
            logits = model(input_ids=batch[:, prefix:-1].to(kept.device), **over(cache), **positions).logits
            guesses = torch.log_softmax(logits.float(), -1)
            nats[name].append(window_nats(guesses, targets))
            if truth is None:
                truth = guesses
            else:
                further = torch.nn.functional.kl_div(guesses, truth, reduction="sum", log_target=True)
                divergence[name] += float(further)
        tick()
    windows_nats = {name: torch.cat(found) for name, found in nats.items()}
    return {
        name: judge(
            found,
            windows_nats["full precision"],
            divergence=divergence.get(name, 0.0) / len(rows) / scored,
            refused_pages=getattr(changes.get(name), "refused_pages", 0),
        )
        for name, found in windows_nats.items()
    }


def window_nats(guesses: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return nats a token of every window, float64 ``[rows]``.

    ``guesses``: log-probabilities ``[rows, tokens, vocabulary]``; ``targets``: int64 ``[rows, tokens]``.
    """
    return -guesses.gather(-1, targets[..., None])[..., 0].double().mean(-1).cpu()


def judge(nats: torch.Tensor, reference: torch.Tensor, *, divergence: float, refused_pages: int) -> Quality:
    """Return what a change cost whose windows took ``nats`` ``[windows]``, and ``reference`` without it."""
    worse = nats - reference
    change = math.expm1(worse.mean())
    # Of the same windows, so that what is hard about a text counts for neither.
    error = (1 + change) * float(worse.std()) / len(worse) ** 0.5 if len(worse) > 1 else math.nan
    return Quality(math.exp(nats.mean()), change, divergence, refused_pages, error)


def can_be_shortened(model: PreTrainedModel) -> bool:
    """Return whether fewer tokens can be kept here: every layer sees all of them, at positions it is told."""
    config = model.config.get_text_config()
    kinds = layer_kinds(model.config)
    windowed = getattr(config, "sliding_window", None) is not None
    return _takes_positions(model) and (set(kinds) == {"full_attention"} if kinds else not windowed)


def _takes_positions(model: PreTrainedModel) -> bool:
    return "position_ids" in inspect.signature(model.forward).parameters


class _Kept(NamedTuple):
    """What the layers keep of a batch's prefix."""

    cache: DynamicCache
    device: torch.device


def _prefilled(model: PreTrainedModel, ids: torch.Tensor) -> _Kept:
    device = model.device
    cache = DynamicCache(config=model.config)
    model(input_ids=ids.to(device), **over(cache))
    if not any(True for _ in _pairs(cache)):
        raise UnsupportedError(f"{type(model).__name__} keeps no K and V in transformers' cache")
    return _Kept(cache, device)


def _pairs(cache: DynamicCache) -> Iterator[Any]:
    """Yield the layers that keep K and V."""
    for layer in cache.layers:
        keys = getattr(layer, "keys", None)
        if keys is not None and keys.dim() == 4:
            yield layer


def _changed(cache: DynamicCache, change: Change | None) -> DynamicCache:
    """Return a copy of what the layers keep, each layer's K and V changed."""
    copied = copy.deepcopy(cache)
    if change is not None:
        for layer in _pairs(copied):
            layer.keys, layer.values = change(layer.keys, layer.values)
    return copied
