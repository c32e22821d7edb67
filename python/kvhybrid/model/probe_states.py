"""What the probe asks of models with layers that keep a state, beside what it asks of every model.

That a text can be gone on from a state at all, that padding leaves no trace in it, and that a state taken
out and put back is the same state: found by running the model, not believed of its class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvhybrid.errors import UnsupportedError
from kvhybrid.model.layer_states import name_layers, state_layers
from kvhybrid.model.versions import over

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from kvhybrid.model.transformers_cache import PagedSession


def refuse_states(model: PreTrainedModel, reason: str) -> None:
    """Raise ``UnsupportedError`` naming the layers of ``model`` that keep a state, where there are any."""
    if layers := state_layers(model.config):
        raise UnsupportedError(
            f"{type(model).__name__}: {name_layers(model.config, layers)} keep a recurrent state: {reason}"
        )


def describe_states(model: PreTrainedModel) -> str:
    """Say what is done with the states of ``model``; nothing where there are none."""
    kinds: dict[str, int] = {}
    for layer in state_layers(model.config):
        kind = name_layers(model.config, [layer]).partition("(")[2].rstrip(")")
        kinds[kind] = kinds.get(kind, 0) + 1
    if not kinds:
        return ""
    counted = " and ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"; the state of {counted} layers is kept at the ends of blocks"


def logits_alone(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits ``[1, tokens, vocab]`` of a text ``[1, tokens]``, in one pass without a cache."""
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits.float()


def resumed_logits(
    model: PreTrainedModel, first: PagedSession, second: PagedSession, ids: torch.Tensor
) -> torch.Tensor | None:
    """Run ``ids`` ``[1, tokens]`` through one session, then through another that finds its states.

    Returns the second's logits of what it computed itself, or None when it found no state.
    """
    first.rows.prepare(ids, None)
    model(input_ids=ids, **over(first), use_cache=True)
    first.rows.release()
    second.rows.prepare(ids, None)
    if (held := second.rows.columns) == 0:
        return None
    logits: torch.Tensor = model(input_ids=ids[:, held:], **over(second), use_cache=True).logits
    second.rows.release()
    return logits.float()
