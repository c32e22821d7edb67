"""transformers' own cache with tokens taken out of it: what a compressed session is compared with."""

from typing import Any

from transformers import DynamicCache


class Gapped(DynamicCache):
    """Shorter than its text by ``gap`` tokens."""

    gap = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return int(super().get_seq_length(layer_idx)) + self.gap

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        fed = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length(layer_idx) - self.gap + fed, self.gap
