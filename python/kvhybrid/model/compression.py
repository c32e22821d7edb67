"""``Compression``: how a model's sessions are compressed, and whether they can be.

One an attachment. What is asked for is judged here, before anything is touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvhybrid.cache.compress.scorers import NEED_QUERIES
from kvhybrid.errors import InvalidRequestError, UnsupportedError
from kvhybrid.presets import CompressionScorer

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvhybrid.config import KVCacheConfig


class Compression:
    """What the configuration says of it, and what stands in its way: ``obstacle`` is asked once, if ever."""

    def __init__(
        self, config: KVCacheConfig, *, sees_queries: bool, obstacle: Callable[[], str | None]
    ) -> None:
        """``sees_queries``: our attention function runs, which SnapKV and TOVA need."""
        self.kept = config.compression_ratio if config.use_compression else 1.0
        """The share of old tokens that a session keeps behind each turn; 1.0 is off."""
        self.scorer = config.compression_scorer
        self._is_exact = config.reproducible
        self._sees_queries = sees_queries
        self._find_obstacle = obstacle
        self._obstacle: str | None = None
        self._was_asked = False
        if self.kept < 1.0:
            self.check(self.scorer)

    @property
    def observes(self) -> bool:
        """True when queries are kept for the scorer that the configuration names."""
        return self.scorer in NEED_QUERIES and self._sees_queries

    def check(self, scorer: CompressionScorer) -> None:
        """Raise ``UnsupportedError``, saying why, when the model's sessions cannot be compressed so."""
        if scorer in NEED_QUERIES and not self._sees_queries:
            raise UnsupportedError(
                f"compression_scorer={scorer.value!r} scores by queries, which the materialised route does "
                f"not see: use one of {', '.join(sorted(set(CompressionScorer) - NEED_QUERIES))}"
            )
        if self._is_exact:
            raise UnsupportedError("reproducible=True promises a whole text's answers: it is not compressed")
        if not self._was_asked:
            self._obstacle, self._was_asked = self._find_obstacle(), True
        if self._obstacle is not None:
            raise UnsupportedError(f"sessions of this model cannot be compressed: {self._obstacle}")

    def asked(
        self, kept: float | None, removed: float | None, scorer: CompressionScorer | str | None
    ) -> tuple[float, CompressionScorer]:
        """Return the share to keep and the scorer; raises ``InvalidRequestError`` for what is no share."""
        if kept is not None and removed is not None:
            raise InvalidRequestError(f"kept={kept} and removed={removed}: give one, removed is 1 - kept")
        for name, share in (("kept", kept), ("removed", removed)):
            if share is not None and (isinstance(share, bool) or not isinstance(share, int | float)):
                raise InvalidRequestError(f"{name}={share!r}: must be a number")
        if removed is not None and not 0 <= removed < 1:
            raise InvalidRequestError(f"removed={removed}: must be at least 0 and below 1")
        if kept is not None and not 0 < kept <= 1:
            raise InvalidRequestError(f"kept={kept}: must be above 0 and at most 1")
        if scorer is not None and scorer not in set(CompressionScorer):
            raise InvalidRequestError(f"scorer={scorer!r}: must be one of {', '.join(CompressionScorer)}")
        which = self.scorer if scorer is None else CompressionScorer(scorer)
        if removed is not None:
            return 1 - removed, which
        return self.kept if kept is None else kept, which
