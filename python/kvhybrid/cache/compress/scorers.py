"""Which tokens matter: six ways to tell, each from its paper, as kvpress 0.5 computes them.

A scorer looks at one layer of one or more texts of equal length and returns a number for each token and
head; the highest are kept. Everything is computed in float32, whatever the pages' dtype: in halves too many
scores tie. Knows tensors; no pages and no sessions.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch.nn import functional

from kvhybrid.cache.compress.selection import SINKS
from kvhybrid.presets import CompressionScorer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Tokens of a partition that LagKV ranks against the next one.
LAG: Final = 128
# Width of the pooling that spreads SnapKV's attention over neighbours.
POOL: Final = 5


class Queries(NamedTuple):
    """Queries of a text's last tokens, as they attended."""

    states: torch.Tensor
    """``[rows, heads, tokens, head_dim]``, after rotary embedding."""
    scale: float
    """What their products with keys are multiplied by."""


def streaming(keys: torch.Tensor, values: torch.Tensor, queries: Queries | None) -> torch.Tensor:
    """Score by recency: with the first tokens always kept, StreamingLLM (arXiv 2309.17453)."""
    del values, queries
    recency = torch.arange(keys.shape[2], dtype=torch.float32, device=keys.device)
    return recency.expand(keys.shape[:3])


def knorm(keys: torch.Tensor, values: torch.Tensor, queries: Queries | None) -> torch.Tensor:
    """Score by small norms of keys: those are attended to most (arXiv 2406.11430)."""
    del values, queries
    norms: torch.Tensor = torch.linalg.vector_norm(keys, dim=-1)
    return -norms


def keydiff(keys: torch.Tensor, values: torch.Tensor, queries: Queries | None) -> torch.Tensor:
    """Score by how little a key is like the mean of all keys' directions: KeyDiff (arXiv 2504.15364)."""
    del values, queries
    anchor = functional.normalize(keys, p=2, dim=-1).mean(dim=2, keepdim=True)
    return -functional.cosine_similarity(keys, anchor, dim=-1)


def lagkv(keys: torch.Tensor, values: torch.Tensor, queries: Queries | None) -> torch.Tensor:
    """Score by how K and V stand out from the range of the next tokens: LagKV (arXiv 2504.04704).

    Tokens are ranked within their partition of ``LAG``; the last one, that has none to be measured against,
    is kept before all others. A text of fewer than two partitions is scored by recency.
    """
    del queries
    tokens = keys.shape[2]
    scores = torch.ones(keys.shape[:3], dtype=torch.float32, device=keys.device)
    if tokens < SINKS + 2 * LAG:
        if tokens > SINKS:
            scores[:, :, SINKS:] = torch.arange(tokens - SINKS, device=keys.device) / (tokens - SINKS)
        return scores
    end = SINKS + (tokens - SINKS) // LAG * LAG
    spread = (_spread(keys[:, :, SINKS:end]) + _spread(values[:, :, SINKS:end])) / 2
    ranks = spread.argsort(dim=-1).argsort(dim=-1) / LAG
    scores[:, :, SINKS : end - LAG] = ranks.flatten(2)
    return scores


def _spread(states: torch.Tensor) -> torch.Tensor:
    """Return tokens' spread in the range of the next partition, ``[rows, heads, partitions - 1, LAG]``."""
    parts = states.unflatten(2, (-1, LAG))
    ranges = parts[:, :, 1:]
    low, high = ranges.amin(dim=-2, keepdim=True), ranges.amax(dim=-2, keepdim=True)
    # A channel that is the same in a whole partition has no range: it says nothing instead of NaN.
    spread: torch.Tensor = ((parts[:, :, :-1] - low) / (high - low)).std(dim=-1).nan_to_num(0.0, posinf=0.0)
    return spread.softmax(dim=-1)


def snapkv(keys: torch.Tensor, values: torch.Tensor, queries: Queries | None) -> torch.Tensor:
    """Score by the attention that the last tokens paid, pooled over neighbours: SnapKV (arXiv 2404.14469).

    The tokens observed are kept before all others.
    """
    del values
    assert queries is not None
    window = queries.states.shape[2]
    paid = _attention(keys, queries).mean(dim=-2)
    pooled = functional.avg_pool1d(paid, kernel_size=POOL, padding=POOL // 2, stride=1)
    scores = pooled.unflatten(1, (keys.shape[1], -1)).mean(dim=2)
    return functional.pad(scores, (0, window), value=float(scores.max()) + 1)


def tova(keys: torch.Tensor, values: torch.Tensor, queries: Queries | None) -> torch.Tensor:
    """Score by the attention that the last token paid, the same for every head: TOVA (arXiv 2401.06104)."""
    del values
    assert queries is not None
    last = Queries(queries.states[:, :, -1:], queries.scale)
    scores = _attention(keys, last).mean(dim=1).repeat(1, keys.shape[1], 1)
    return functional.pad(scores, (0, 1), value=float(scores.max()) + 1)


def _attention(keys: torch.Tensor, queries: Queries) -> torch.Tensor:
    """Return what the last tokens paid to those before them all, ``[rows, heads, window, before]``."""
    rows, heads, window, dim = queries.states.shape
    kv_heads, tokens = keys.shape[1:3]
    # The heads of a group side by side: keys are not expanded.
    folded = queries.states.float().reshape(rows, kv_heads, heads // kv_heads * window, dim)
    products = (folded @ keys.transpose(2, 3) * queries.scale).view(rows, heads, window, tokens)
    later = torch.ones(window, tokens, dtype=torch.bool, device=keys.device).triu(tokens - window + 1)
    return products.masked_fill(later, -torch.inf).softmax(dim=-1)[..., : tokens - window]


SCORERS: Final[
    Mapping[CompressionScorer, Callable[[torch.Tensor, torch.Tensor, Queries | None], torch.Tensor]]
] = MappingProxyType(
    {
        CompressionScorer.STREAMING: streaming,
        CompressionScorer.KEYDIFF: keydiff,
        CompressionScorer.LAGKV: lagkv,
        CompressionScorer.KNORM: knorm,
        CompressionScorer.SNAPKV: snapkv,
        CompressionScorer.TOVA: tova,
    }
)
"""Each takes float32 K and V ``[rows, num_kv_heads, tokens, width]`` and, some, queries; returns
``[rows, num_kv_heads, tokens]``."""

NEED_QUERIES: Final = frozenset({CompressionScorer.SNAPKV, CompressionScorer.TOVA})
"""Those that ask what the last tokens attended to: on the paged route alone somebody sees that."""
