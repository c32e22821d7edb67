"""How many tokens stay, and which: a count for all heads and layers, and each head's own choice.

The first tokens hold attention that has nowhere else to go, and the last ones are what is being talked about:
both always stay.
"""

from __future__ import annotations

from typing import Final

import torch

# Always kept: at the beginning, and at the end.
SINKS: Final = 4
RECENT: Final = 32


def kept_tokens(tokens: int, kept: float) -> int:
    """Return how many of a text's ``tokens`` stay when a share ``kept`` of its old ones does.

    Old is what comes before the last ``RECENT``. Rounded down, as kvpress does, and never fewer than the
    first ``SINKS``.
    """
    recent = min(tokens, RECENT)
    old = tokens - recent
    return recent + max(int(old * kept), min(old, SINKS))


def choose(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the places of the ``count`` tokens that stay, ``[rows, heads, count]`` in the text's order.

    ``scores``: ``[rows, heads, tokens]``, the highest stay; NaN comes last. The first and the last tokens
    stay whatever their scores, so ``count`` is at least as many as those are.
    """
    bounded = scores.float().nan_to_num(nan=-torch.inf, posinf=torch.finfo(torch.float32).max)
    bounded[..., :SINKS] = torch.inf
    bounded[..., -RECENT:] = torch.inf
    return bounded.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values


def gather(states: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return the tokens at ``places`` ``[rows, heads, count]`` of ``[rows, heads, tokens, width]``."""
    return states.gather(2, places[..., None].expand(-1, -1, -1, states.shape[3]))
