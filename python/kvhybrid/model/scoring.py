"""Log-likelihoods of many continuations after one context, whose K and V are computed once.

What evaluation harnesses, rerankers and classifiers ask of a model. Knows attachments and their
sessions; which model it is, and how it reads pages, is theirs to know.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, NamedTuple

import torch

from kvhybrid.cache.measured import input_device
from kvhybrid.errors import InvalidRequestError
from kvhybrid.model.padding import read_ids
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvhybrid.model.attach import Attachment


class Score(NamedTuple):
    """What a model makes of one continuation."""

    log_likelihood: float  # nats, all tokens together
    is_greedy: bool  # whether greedy decoding would have written it


@torch.no_grad()
def score_continuations(
    attachment: Attachment,
    context: Sequence[int],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
) -> list[Score]:
    """Return a score for each continuation of ``context``, in order.

    Of the context, only what is not cached yet is computed, and that once for all continuations; they run
    over it in forks, at most ``batch_size`` at a time. The context stays cached for whatever begins like it.

    Raises ``InvalidRequestError`` for an empty context or continuation and for ids outside the vocabulary,
    ``CapacityError`` when the context, or the forks of one batch, do not fit the cache.
    """
    if batch_size < 1:
        raise InvalidRequestError(f"batch_size must be at least 1, got {batch_size}")
    model = attachment.model
    device = input_device(model)
    prompt = torch.tensor([list(context)], dtype=torch.long, device=device)
    texts = [torch.tensor(list(text), dtype=torch.long, device=device) for text in continuations]
    for text in texts:
        read_ids(text[None], attachment.vocab_size)
    session = attachment.session("")
    with session.rows.owner.in_use():
        try:
            session.rows.prepare(prompt, None)
            held, last = session.get_seq_length(), prompt.shape[1] - 1
            # The last token waits: its logits are the first that a continuation is scored by.
            if held < last:
                model(input_ids=prompt[:, held:last], **over(session), **_few_logits(attachment))
            session.rows.crop(last)
            scores: list[Score] = []
            for start in range(0, len(texts), batch_size):
                batch = texts[start : start + batch_size]
                session.batch_repeat_interleave(len(batch))
                fed = torch.nn.utils.rnn.pad_sequence(
                    [torch.cat((prompt[0, last:], text[:-1])) for text in batch], batch_first=True
                )
                # Padding on the right is text like any other here: causal attention hides it from the rest.
                logits = model(input_ids=fed, **over(session)).logits
                scores += [_score(row, text) for row, text in zip(logits, batch, strict=True)]
                session.rows.crop(last)
                session.rows.select([0])
        finally:
            session.close()
    return scores


def _few_logits(attachment: Attachment) -> dict[str, int]:
    """Return the argument that keeps a model from computing logits of a whole context, where it takes one."""
    takes = "logits_to_keep" in inspect.signature(attachment.model.forward).parameters
    return {"logits_to_keep": 1} if takes else {}


def _score(logits: torch.Tensor, text: torch.Tensor) -> Score:
    """Score ``text`` ``[tokens]`` by logits ``[at least as many, vocabulary]``, the first for the first."""
    choices = torch.log_softmax(logits[: len(text)].float(), dim=-1)
    chosen = choices.gather(1, text[:, None])
    return Score(float(chosen.sum()), bool((choices.argmax(dim=-1) == text).all()))
