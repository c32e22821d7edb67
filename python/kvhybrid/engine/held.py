"""``Held``: what a conversation holds between its turns, where its old context is compressed.

A whole text's pages are everybody's, and found again. Compressed ones are the conversation's alone: they are
held here from turn to turn, and given up when there is no room for others; the text is then computed again,
whole. Rows take them and bring them back in the lane's thread; whoever needs room asks in any other.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from kvhybrid.cache.compress.scorers import SCORERS
from kvhybrid.cache.memory import is_out_of_memory
from kvhybrid.model.compressed import shared_tokens
from kvhybrid.model.shorten import Computed, removable, shorten

if TYPE_CHECKING:
    import torch

    from kvhybrid.cache.kv_cache import KVCache
    from kvhybrid.model.compression import Compression
    from kvhybrid.model.rows import Text
    from kvhybrid.model.weights import StateName

__all__ = ["Held"]


class Held:
    """One conversation's compressed text at rest, if there is one."""

    def __init__(self, cache: KVCache, compression: Compression) -> None:
        self._cache = cache
        self._kept = compression.kept
        self._scorer = compression.scorer
        self._lock = threading.RLock()
        self._computed: Computed | None = None
        self._name: StateName | None = None  # what the model was called that computed it
        self._is_closed = False

    def take(self, tokens: Text, name: StateName | None) -> Computed | None:
        """Hand out what is held for a prompt that goes on from it, its new tokens pending.

        ``name``: what the model is called now. None when nothing is held, when the model has changed, or for
        another prompt: it is given up then. The last token is left to compute. ``text`` is what of the prompt
        was computed.
        """
        with self._lock:
            if name is None or name != self._name:
                return None  # kept: a model that fails may be mended, and what it computed is right again
            found, self._computed = self._computed, None
        if found is None:
            return None
        shared = min(shared_tokens(found.text, tokens), len(tokens) - 1)
        if shared < len(found.front.text):
            found.sequence.close()
            return None
        found.sequence.truncate(shared - found.front.removed)
        found.sequence.append(tokens[shared:])
        return Computed(found.sequence, tokens[:shared], found.front)

    def rest(self, computed: Computed, name: StateName | None) -> None:
        """Hold what was taken again, with what was computed since; pending tokens are forgotten.

        ``name``: what the model was called when the text was opened.
        """
        computed.sequence.truncate(computed.sequence.length)
        with self._lock:
            self._name = name
            before, self._computed = self._computed, None if self._is_closed else computed
            gone = computed if self._is_closed else before
        if gone is not None:
            gone.sequence.close()
        if gone is not computed:
            self._cache.compressed.rest(self)

    def keep(self, computed: Computed, name: StateName | None) -> None:
        """Compress a finished turn's text and hold it. ``computed``'s sequence is closed, or held.

        A text that is too short, or without room for both, stays what it is: a whole one is let go of, and
        found again. So does one that cannot be scored: its answer was given.
        """
        try:
            if not self._is_closed and removable([computed], self._kept):
                whole, (computed,) = computed, shorten(self._cache, [computed], self._kept, self._score)
                whole.sequence.close()
        except Exception as error:
            self._cache.compressed.skipped()
            if not is_out_of_memory(error):
                logging.getLogger(__name__).exception("a conversation could not be compressed")
        if computed.front.removed:
            self.rest(computed, name)
        else:
            computed.sequence.close()

    def _score(self, layer: int, row: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        del layer, row
        return SCORERS[self._scorer](keys, values, None)

    def let_go(self) -> bool:
        """Give the pages back for others' sake; False when none are at rest."""
        with self._lock:
            found, self._computed = self._computed, None
        if found is None:
            return False
        found.sequence.close()
        return True

    def close(self) -> None:
        """Give the pages back, those that a row holds now as soon as it brings them. Idempotent."""
        with self._lock:
            self._is_closed = True
        self.let_go()
        self._cache.storage.settled()
