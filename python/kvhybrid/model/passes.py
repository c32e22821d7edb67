"""One call of ``forward`` as several forward passes: cutting its arguments, joining its outputs.

Knows names of arguments and shapes of outputs; no pages and no sessions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.generic import ModelOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Arguments = dict[str, Any]

KEEPS = ("logits_to_keep", "num_logits_to_keep")
# Asked for with these, an output is no row of values a token, and cannot be joined.
WHOLE = ("labels", "output_router_logits")


def bounded(start: int, stops: list[int], most: int) -> list[int]:
    """Return ``stops`` and others, so that no pass from ``start`` on is longer than ``most`` columns."""
    found: list[int] = []
    for stop in stops:
        found.extend(range(start + most, stop, most))
        found.append(stop)
        start = stop
    return found


def parts(call: Arguments, start: int, stops: list[int]) -> Iterator[Arguments]:
    """Cut a call whose tokens begin at column ``start`` into calls that end at the columns ``stops``."""
    first = start
    for stop in stops:
        fed = slice(first - start, stop - start)
        part = {**call, "input_ids": call["input_ids"][:, fed]}
        if (mask := call.get("attention_mask")) is not None and mask.dim() == 2:
            part["attention_mask"] = mask[:, :stop]
        if (positions := call.get("position_ids")) is not None:
            part["position_ids"] = positions[..., fed]
        if (positions := call.get("cache_position")) is not None:
            part["cache_position"] = positions[fed]
        for name in KEEPS:
            if isinstance(keep := call.get(name), torch.Tensor):
                part.pop(name)
            elif keep:
                part[name] = max(1, keep - (stops[-1] - stop))
        yield part
        first = stop


def join(outputs: list[Any], call: Arguments) -> Any:
    """Join the outputs of a call's parts: tokens one behind the other, the logits that were asked for."""
    if len(outputs) == 1:
        return outputs[0]
    joined = _zipped(lambda values: torch.cat(values, dim=1), outputs)
    keep = next((call[name] for name in KEEPS if call.get(name) is not None), 0)
    if isinstance(keep, int):
        keep = slice(-keep, None) if keep else slice(None)
    if isinstance(joined, tuple):
        return (joined[0][:, keep], *joined[1:])
    joined["logits"] = joined["logits"][:, keep]
    return joined


def narrow(call: Arguments, each: int) -> Arguments:
    """Take one of every ``each`` equal rows."""
    batch = len(call["input_ids"])
    is_batch = {
        name: isinstance(value, torch.Tensor) and value.dim() > 1 and len(value) == batch
        for name, value in call.items()
    }
    return {name: value[::each] if is_batch[name] else value for name, value in call.items()}


def widen(output: Any, each: int) -> Any:
    """Repeat every row of an output, the copies beside it."""
    return _zipped(lambda values: values[0].repeat_interleave(each, dim=0), [output])


def _zipped(change: Callable[[list[torch.Tensor]], torch.Tensor], values: list[Any]) -> Any:
    """Change the tensors of equal structures, one of each at a time; anything else is the first's."""
    first = values[0]
    if isinstance(first, torch.Tensor):
        return change(values)
    if isinstance(first, ModelOutput):
        return type(first)(**{name: _zipped(change, [v[name] for v in values]) for name in first})
    if isinstance(first, tuple):
        return tuple(_zipped(change, list(each)) for each in zip(*values, strict=True))
    return values[-1]
