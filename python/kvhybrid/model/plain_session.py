"""``PlainSession``: the session of a call that knows of none, which must work as it does without us.

When a session can take no more (no room, an argument that pages cannot stand for), its K and V so far go into
a cache of ``transformers``, and the call goes on over that one: nothing is computed twice, no token is lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import DynamicCache

from kvhybrid.model.transformers_cache import PagedSession

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

__all__ = ["PlainSession"]


class PlainSession(PagedSession):
    """A session that may hand over to a cache of transformers in the middle of a call."""

    handed: DynamicCache | None = None
    """The cache that the call goes on over, once it was handed over."""
    in_call = False
    """True while the call runs that knows of no session. Whoever gets it afterwards has a session."""

    @property
    def can_hand_over(self) -> bool:
        """Return whether the call can go on over a cache of transformers: not from states."""
        return self.in_call and self.rows.states is None

    def hand_over(self, model: PreTrainedModel, dtype: torch.dtype, rows: int) -> DynamicCache:
        """Give K and V of all columns, as ``dtype`` and for ``rows`` rows, to a cache of transformers."""
        handed = DynamicCache(config=model.config)
        if self.rows.columns:
            held = self.rows.take_pages()
            for layer, shape in enumerate(self.rows.cache.layout.layers):
                if shape is not None:
                    keys, values = held.materialise(layer)
                    handed.update(keys.to(dtype), values.to(dtype), layer)
            if rows > self.rows.num_rows:
                handed.batch_repeat_interleave(rows // self.rows.num_rows)
        self.handed = handed
        self.layers = handed.layers
        self.rows.release()
        return handed

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns held, padding included."""
        return (
            super().get_seq_length(layer_idx)
            if self.handed is None
            else self.handed.get_seq_length(layer_idx)
        )

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Return the column of the next token."""
        if self.handed is None:
            return super().get_query_offset(layer_idx)
        return self.handed.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: int | torch.Tensor, layer_idx: int) -> tuple[int, int]:
        """Return ``(columns stored after this forward pass, columns of the text before them)``."""
        if self.handed is None:
            return super().get_mask_sizes(query_length, layer_idx)
        return self.handed.get_mask_sizes(query_length, layer_idx)  # type: ignore[arg-type]  # as versions do

    def crop(self, max_length: int) -> None:
        """Remove the last ``-max_length`` columns, or, given a positive number, keep that many."""
        if self.handed is None:
            super().crop(max_length)
        else:
            self.handed.crop(max_length)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the rows ``beam_idx``, in that order."""
        if self.handed is None:
            super().reorder_cache(beam_idx)
        else:
            self.handed.reorder_cache(beam_idx)  # type: ignore[arg-type]  # a tensor of int64

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices``, in that order."""
        if self.handed is None:
            super().batch_select_indices(indices)
        else:
            self.handed.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, copies beside their row."""
        if self.handed is None:
            super().batch_repeat_interleave(repeats)
        else:
            self.handed.batch_repeat_interleave(repeats)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store a layer's new K and V; return what the layer's attention is to read."""
        if self.handed is None:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self.handed.update(key_states, value_states, layer_idx, *args, **kwargs)

    @property
    def is_initialized(self) -> bool:
        """True once anything is held."""
        return super().is_initialized if self.handed is None else bool(self.handed.is_initialized)
