"""A bench of one model: copies of its module tree that take turns, and what a comparison comes to.

Every way has a module tree of its own over the same weights, and the ways take turns: what the machine does
beside falls on all alike. Prompts are random tokens, new ones each time.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch

from kvhybrid.config import KVCacheConfig
from kvhybrid.model.attach import Attachment, attach
from kvhybrid.model.padding import vocab_size
from kvhybrid.report import interleaved

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from transformers import PreTrainedModel

OURS: Final = "kvhybrid"
BLOCK: Final = 64


@dataclass(kw_only=True)
class Comparison:
    """One question, and what each way took for it."""

    name: str
    """What its figures begin with."""
    title: str
    seconds: dict[str, float]
    """Median seconds by way; ours is ``OURS``."""
    equal: bool
    """Whether every way came to the same tokens."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Ways that could not be measured, and why."""


class Bench:
    """A model, copies of its module tree for the ways, and prompts that nobody has seen."""

    def __init__(self, model: PreTrainedModel, rounds: int) -> None:
        self.model = model
        self.rounds = rounds
        self._generator = torch.Generator().manual_seed(0)

    def twin(self) -> PreTrainedModel:
        """Return another module tree over the same weights: what is attached to it, this one knows not of."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        twin: PreTrainedModel = copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})
        return twin

    def attached(self, max_tokens: int, bits: int = 16) -> Attachment:
        """Return a twin with room for ``max_tokens``, in pages of ``bits`` bits where they are cold."""
        config = KVCacheConfig(
            max_tokens=-(-max_tokens // BLOCK) * BLOCK,
            block_size=BLOCK,
            use_quantization=bits < 16,
            quantization_bits=bits,
            dtype=self.model.dtype,
            _env_file=None,
        )
        return attach(self.twin(), config=config)

    def prompt(self, count: int) -> torch.Tensor:
        """Return ``[1, count]`` ids that were not asked for before."""
        ids = torch.randint(0, vocab_size(self.model), (1, count), generator=self._generator, device="cpu")
        return ids.to(self.model.device)

    def answer(self, model: Any, ids: torch.Tensor, count: int, **options: Any) -> list[int]:
        """Return ``count`` new tokens, greedily."""
        mask = torch.ones_like(ids)
        options |= {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False}
        found: list[int] = model.generate(ids, attention_mask=mask, **options)[0, -count:].tolist()
        return found

    def turns(self, calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
        """Return the median seconds of each call, taken in turns; what a GPU was told to do is awaited."""
        if self.model.device.type != "cuda":
            return interleaved(calls, rounds)

        def awaited(call: Callable[[], object]) -> Callable[[], object]:
            def both() -> None:
                call()
                torch.cuda.synchronize(self.model.device)

            return both

        return interleaved({way: awaited(call) for way, call in calls.items()}, rounds)
