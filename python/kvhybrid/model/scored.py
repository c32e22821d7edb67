"""Attention by its formula, for what torch's own function does not compute: soft caps and sinks.

As the eager code of transformers' models: products times the scale, the cap, the mask, a softmax in float32
with the sink as one more score that gives nothing. Queries are taken a block at a time, so that scores
never need more than ``SCORES`` places, however long the text; a block reads what it sees, and no more.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch

# Scores held at once, in float32: 64 MiB.
SCORES: Final = 2**24


class Extras(NamedTuple):
    """What changes scores beside the scale."""

    cap: float | None = None
    """Scores become ``cap * tanh(score / cap)``."""
    sinks: torch.Tensor | None = None
    """``[heads]``: one more score a head, which takes weight and gives nothing."""


def attend_scored(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    window: int | None,
    extras: Extras,
) -> torch.Tensor:
    """Attend causally for one row's last tokens over contiguous K and V that end with them.

    ``query`` ``[heads, count, head_dim]``, ``keys`` and ``values`` ``[num_kv_heads, tokens, width]``;
    returns ``[heads, count, value_head_dim]``.
    """
    heads, count, dim = query.shape
    kv_heads, tokens, width = values.shape
    grouped = query.view(kv_heads, heads // kv_heads, count, dim)
    past = tokens - count
    result = query.new_empty((kv_heads, heads // kv_heads, count, width))
    at_once = max(SCORES // (heads * tokens), 1)
    for begin in range(0, count, at_once):
        end = min(begin + at_once, count)
        first = 0 if window is None else max(past + begin + 1 - window, 0)
        seen = slice(first, past + end)
        asked = grouped[:, :, begin:end].reshape(kv_heads, -1, dim)
        scores = (asked @ keys[:, seen].transpose(1, 2)).float().mul_(scale)
        if extras.cap is not None:
            scores.div_(extras.cap).tanh_().mul_(extras.cap)
        scores = scores.view(kv_heads, -1, end - begin, past + end - first)
        scores.masked_fill_(_hidden(past + begin, past + end, first, window, query.device), -math.inf)
        weights = _softmax(scores, extras.sinks).to(values.dtype)
        part = weights.flatten(1, 2) @ values[:, seen]
        result[:, :, begin:end] = part.view(kv_heads, -1, end - begin, width)
    return result.view(heads, count, width)


def _hidden(begin: int, end: int, first: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Return what the tokens ``[begin, end)`` do not see of ``[first, end)``."""
    own = torch.arange(begin, end, device=device)[:, None]
    there = torch.arange(first, end, device=device)
    hidden = there > own
    return hidden if window is None else hidden | (there <= own - window)


def _softmax(scores: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Return the weights of ``[num_kv_heads, group, count, tokens]``, the sinks' own share left out."""
    if sinks is None:
        return scores.softmax(dim=-1)
    sink = sinks.to(scores).view(*scores.shape[:2], 1, 1).expand(*scores.shape[:3], 1)
    return torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
