"""``Runner``: one planned step through the model, logits out. One a lane, used by one thread at a time.

*Ragged*: the new tokens of all rows lie one behind the other in a single row of input, positions given,
and attention tells them apart by the step's spans: no padding is ever computed. *Rowwise*: a forward
pass a row over contiguous tensors, for models whose attention does not read pages.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from kvhybrid.model.attention import PagedAttention
from kvhybrid.model.attention_name import StandIn
from kvhybrid.model.interface import reading_pages
from kvhybrid.model.routes import MaterialisedReader, PagedReader
from kvhybrid.model.versions import columns_fed, over

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel

    from kvhybrid.cache.pages import PageStorage
    from kvhybrid.cache.step import Step
    from kvhybrid.model.routes import Reader


class Packing(StrEnum):
    """How the rows of a step are laid out for the model."""

    RAGGED = "ragged"
    ROWWISE = "rowwise"


class Runner:
    """Runs steps over ``storage`` through ``model``."""

    def __init__(
        self,
        model: PreTrainedModel,
        storage: PageStorage,
        packing: Packing,
        watching: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """``watching`` is entered around every forward pass."""
        self.model = model
        self.packing = packing
        self._storage = storage
        self._watching = watching
        self._paged = PagedReader(PagedAttention(storage), mirrors=False)
        self._mirrors: dict[int, MaterialisedReader] = {}
        parameters = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        # Models that count positions themselves (BLOOM) count right when rows come one by one.
        self._takes_positions = "position_ids" in parameters or packing is Packing.RAGGED
        self._stand_in = StandIn(model) if packing is Packing.RAGGED else None

    @torch.inference_mode()
    def run(
        self, step: Step, tokens: torch.Tensor, keys: Sequence[int], gaps: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Compute the step's ``tokens`` (int64 ``[step.num_tokens]``, rows one behind the other).

        ``keys`` names each row's text over the steps, for ``forget``. ``gaps``: by how many tokens each
        row's pages hold less than its text, whose positions its tokens have. Writes K and V into the pages
        and returns the logits behind each row's last token, float32 ``[rows, vocab]``. Commits nothing.
        """
        gaps = gaps if gaps is not None else [0] * len(step.spans)
        tokens = tokens.to(self._storage.device)
        if self.packing is Packing.RAGGED:
            return self._forward(step, tokens, self._paged, 0, gaps)
        logits, done = [], 0
        for row, key, gap in zip(step.rows(), keys, gaps, strict=True):
            reader = self._mirrors.setdefault(key, MaterialisedReader(self._storage))
            stop = done + row.num_tokens
            logits.append(self._forward(row, tokens[done:stop], reader, row.spans[0].past, [gap]))
            done = stop
        return torch.cat(logits)

    def _forward(
        self, step: Step, tokens: torch.Tensor, reader: Reader, columns: int, gaps: Sequence[int]
    ) -> torch.Tensor:
        positions = torch.cat(
            [
                torch.arange(span.past + gap, span.total + gap, device="cpu")
                for span, gap in zip(step.spans, gaps, strict=True)
            ]
        )
        last = torch.tensor([span.count for span in step.spans], device="cpu").cumsum(0) - 1
        options: dict[str, Any] = {}
        if self._keeps_logits:
            options["logits_to_keep"] = last.to(tokens.device)
        if self._takes_positions:
            options["position_ids"] = positions[None].to(tokens.device)
        reader.start(columns)
        attending = self._stand_in.attending() if self._stand_in is not None else reading_pages(False)
        with self._watching(), attending:
            output = self.model(
                input_ids=tokens[None],
                **over(StepCache(step, reader, columns, gaps[0] if columns else 0)),
                use_cache=True,
                **options,
            )
        logits: torch.Tensor = output.logits[0]
        if not self._keeps_logits:
            logits = logits[last.to(logits.device)]
        return logits.float()

    def forget(self, key: int) -> None:
        """Drop what is kept beside the pages of that text."""
        self._mirrors.pop(key, None)

    def close(self) -> None:
        """Drop what is kept beside the pages. Idempotent."""
        self._mirrors.clear()


class StepCache(Cache):
    """One step's view of the pages as a cache of transformers: written layer by layer, read through a route.

    ``columns`` are stored before the input's, of a text that is longer by ``gap``.
    """

    def __init__(self, step: Step, reader: Reader, columns: int, gap: int = 0) -> None:
        super().__init__(layers=[])
        self._step, self._reader, self._columns, self._gap = step, reader, columns, gap

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new K and V; return what the layer's attention is to read."""
        return self._reader.read(self._step, layer_idx, key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns before the input's: none when rows are packed."""
        return self._columns + self._gap

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the input's first column."""
        return self._columns + self._gap

    def get_mask_sizes(self, query_length: int | torch.Tensor, layer_idx: int) -> tuple[int, int]:
        """Return ``(columns stored after this forward pass, columns of the text before them)``."""
        return self._columns + columns_fed(query_length), self._gap

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: no bound but the cache's budget."""
        return -1

    @property
    def is_compileable(self) -> bool:
        """False: pages have no static address."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """All False: every layer keeps every token, windows are the mask's."""
        return [False] * self._step.storage.layout.num_layers
