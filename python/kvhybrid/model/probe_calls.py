"""What the probe asks of the calls that people make, beside its own: a text alone, and ``generate``.

The probe says where everything lies: masks, positions. Whoever calls a model seldom does, and some models
then count or mask in a way of their own, which goes by their own cache.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

import torch

from kvhybrid.model.versions import over

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

# Columns of the prompt that is generated from, and new tokens.
PROMPT, NEW = 12, 3
# As arguments and not as a configuration: in transformers 4 one that says what is the default, not to sample,
# counts as one that says nothing, and the model's own says to. Neutral values of sampling, because those
# would be complained of in the user's log; a cache, because some configurations (MPT's) turn it off.
GREEDILY: dict[str, Any] = {
    "max_new_tokens": NEW,
    "do_sample": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "pad_token_id": 0,
    "eos_token_id": None,
    "use_cache": True,
}


def plain_logits(
    model: PreTrainedModel, ids: torch.Tensor, cache: Cache, steps: tuple[int, ...]
) -> torch.Tensor:
    """Return the logits ``[1, tokens, vocab]`` of ``ids`` ``[1, tokens]`` fed in steps, and nothing else."""
    kept, done = [], 0
    for width in steps:
        output = model(input_ids=ids[:, done : done + width], **over(cache), use_cache=True)
        kept.append(output.logits.float())
        done += width
    return torch.cat(kept, dim=1)


def written_by(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return what ``generate`` writes, greedily, behind the first columns of a left-padded batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        generate = cast("Callable[..., object]", model.generate)
        found = generate(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], **GREEDILY)
    assert isinstance(found, torch.Tensor)
    return found[:, PROMPT:]
