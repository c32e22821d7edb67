"""Choosing the next token of every row of a step.

A row's choice depends on its own logits, parameters and random numbers alone, never on who else is in
the batch. Knows logits; no model and no text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Sampling", "sample"]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request draws its tokens. ``generator`` moves on by one number a token drawn."""

    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None

    @classmethod
    def seeded(cls, temperature: float, top_p: float, seed: int | None) -> Sampling:
        """Return parameters with random numbers of their own; without a ``seed`` unrepeatable ones."""
        if temperature == 0:
            return cls()
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return cls(temperature, top_p, generator)


def sample(logits: torch.Tensor, settings: Sequence[Sampling]) -> list[int | None]:
    """Return the next token of each row of ``logits``, float32 ``[rows, vocab]``.

    None stands for a row that has no likeliest token: NaN among its logits, or nothing finite.
    """
    peaks, tokens = logits.max(dim=-1)
    for narrow in (False, True):
        rows = [i for i, s in enumerate(settings) if s.temperature > 0 and (s.top_p < 1) is narrow]
        if rows:
            chosen = [settings[i] for i in rows]
            tokens[rows] = _draw(logits[rows] - peaks[rows, None], chosen, narrow=narrow)
    usable = peaks.isfinite().tolist()
    return [token if known else None for token, known in zip(tokens.tolist(), usable, strict=True)]


def _draw(logits: torch.Tensor, settings: list[Sampling], *, narrow: bool) -> torch.Tensor:
    """Draw a token a row by inverting its cumulated probabilities at one random number.

    ``logits``: the row's largest is 0, so that no temperature overflows. ``narrow``: keep the fewest
    tokens that reach ``top_p`` (nucleus sampling; Holtzman et al. 2020).
    """
    device = logits.device
    # In float64: in float32 the smallest temperatures are 0, and 0 / 0 is NaN.
    temperature = torch.tensor([s.temperature for s in settings], dtype=torch.float64, device=device)
    weights = torch.softmax(logits.double() / temperature[:, None], dim=-1)
    order = None
    if narrow:
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        top_p = torch.tensor([s.top_p for s in settings], dtype=torch.float64, device=device)
        weights = weights.masked_fill(weights.cumsum(-1) - weights >= top_p[:, None], 0.0)
    reached = weights.cumsum(-1)
    numbers = torch.cat(
        [torch.rand(1, generator=s.generator, dtype=torch.float64, device="cpu") for s in settings]
    )
    aims = numbers.to(device)[:, None] * reached[:, -1:]
    # Rounding may leave an aim at the very end, behind the last token that has any weight.
    last = (weights > 0).int().cumsum(-1).argmax(-1)
    index = torch.minimum(torch.searchsorted(reached, aims, right=True)[:, 0], last)
    return index if order is None else order.gather(-1, index[:, None])[:, 0]
