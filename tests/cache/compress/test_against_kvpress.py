"""The same scores, to the bit, and the same tokens as kvpress, where it is installed.

It asks for an older transformers than ours, so this file runs in an environment of its own:
``uv pip install kvpress pytest pytest-timeout anyio hypothesis`` beside the package.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kvhybrid.cache.compress.scorers import SCORERS, Queries
from kvhybrid.presets import CompressionScorer

kvpress = pytest.importorskip("kvpress", reason="kvpress asks for transformers below 5.3")

HEADS, GROUP, WIDTH = 2, 3, 64
LENGTHS = [37, 100, 300, 517]


def states(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(tokens)
    return torch.randn(2, HEADS, tokens, WIDTH), torch.randn(2, HEADS, tokens, WIDTH)


def theirs(press: Any, keys: torch.Tensor, values: torch.Tensor, **more: Any) -> torch.Tensor:
    given = {"module": None, "hidden_states": None, "attentions": None, "kwargs": {}, **more}
    scores: torch.Tensor = press.score(keys=keys, values=values, **given)
    return scores


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize(
    ("name", "press"), [("knorm", "KnormPress"), ("keydiff", "KeyDiffPress"), ("lagkv", "LagKVPress")]
)
def test_scores_of_keys_and_values_are_bit_equal(name: str, press: str, tokens: int) -> None:
    keys, values = states(tokens)
    ours = SCORERS[CompressionScorer(name)](keys, values, None)
    assert torch.equal(ours, theirs(getattr(kvpress, press)(0.5), keys, values))


@pytest.mark.parametrize("tokens", LENGTHS)
def test_streaming_keeps_the_same_tokens(tokens: int) -> None:
    keys, values = states(tokens)
    press = kvpress.StreamingLLMPress(0.5)
    count = int(tokens * 0.5)
    expected = theirs(press, keys, values).topk(count, dim=-1).indices.sort(dim=-1).values
    scores = SCORERS[CompressionScorer.STREAMING](keys, values, None).clone()
    scores[..., :4] = tokens  # the first four, which are always kept
    assert torch.equal(scores.topk(count, dim=-1).indices.sort(dim=-1).values, expected)


class Attention(torch.nn.Module):
    """What kvpress looks for in an attention layer to compute its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_attention_heads=HEADS * GROUP, num_key_value_heads=HEADS)
        self.head_dim = WIDTH
        self.q_proj = torch.nn.Linear(48, HEADS * GROUP * WIDTH, bias=False)


@pytest.mark.parametrize("tokens", LENGTHS[1:])
@pytest.mark.parametrize(("name", "window"), [("snapkv", 32), ("tova", 1)])
def test_scores_of_attention_are_the_same(name: str, window: int, tokens: int) -> None:
    keys, values = states(tokens)
    module = Attention()
    hidden = torch.randn(2, tokens, 48)
    angles = torch.rand(2, tokens, WIDTH // 2).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    press = kvpress.SnapKVPress(0.5, window_size=window) if name == "snapkv" else kvpress.TOVAPress(0.5)
    more = {"position_embeddings": (cos, sin)}
    expected = theirs(press, keys, values, module=module, hidden_states=hidden, kwargs=more)
    raw = module.q_proj(hidden[:, -32:]).view(2, 32, HEADS * GROUP, WIDTH).transpose(1, 2)
    turned = torch.cat((-raw[..., WIDTH // 2 :], raw[..., : WIDTH // 2]), dim=-1)
    rotated = raw * cos[:, None, -32:] + turned * sin[:, None, -32:]
    ours = SCORERS[CompressionScorer(name)](keys, values, Queries(rotated, WIDTH**-0.5))
    # Their products are of expanded keys, ours of folded queries: sums in another order.
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    for count in {window + (tokens - window) // 2, window + (tokens - window) // 4}:
        chosen, wanted = (
            scores.topk(count, dim=-1).indices.sort(dim=-1).values for scores in (ours, expected)
        )
        assert (chosen == wanted).float().mean() > 0.99  # of scores that close, the same tokens
