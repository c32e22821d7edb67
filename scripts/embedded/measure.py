"""Validation loss of a causal language model, in nats per token and per byte."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ValidationLoss:
    """Mean negative log-likelihood of a text, every token but the first scored once."""

    per_token: float
    per_byte: float
    tokens: int
    bytes: int


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Return the token ids of `text`, int64 [tokens]."""
    # The backend is asked directly: the wrapper warns of texts longer than the model's context.
    ids: list[int] = tokenizer.backend_tokenizer.encode(text).ids
    return torch.tensor(ids)


@torch.inference_mode()
def validation_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    window: int,
    batch_tokens: int = 4096,
) -> ValidationLoss:
    """Score `text` in windows of `window` tokens that share no context.

    Each window starts cold: its first prediction sees one token, its last `window`. No window
    borrows context from another, so these cold starts count.
    """
    was_training = model.training
    model.eval()
    ids = encode(tokenizer, text)
    # The last window is filled up behind its end, where nothing that is scored can see it.
    missing = -(len(ids) - 1) % window
    inputs = functional.pad(ids[:-1], (0, missing)).view(-1, window)
    targets = functional.pad(ids[1:], (0, missing), value=-100).view(-1, window)
    rows = max(1, batch_tokens // window)
    total = 0.0
    for x, y in zip(inputs.split(rows), targets.split(rows), strict=True):
        logits = model(input_ids=x, use_cache=False).logits.float()
        total += functional.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    model.train(was_training)
    num_tokens = len(ids) - 1
    num_bytes = len(text.encode()) - len(str(tokenizer.decode(ids[:1].tolist())).encode())
    return ValidationLoss(total / num_tokens, total / num_bytes, num_tokens, num_bytes)
