"""``SaidOfTexts``: what a cache can be asked of texts, and told of them, by their tokens.

Knows which namespaces a tenant has; all else is the pool's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvhybrid.cache.explained import Explanation, explain
from kvhybrid.cache.retention import Retention, Retentions

if TYPE_CHECKING:
    from kvhybrid._core import PagePool, Pin
    from kvhybrid.cache.namespaces import Namespaces
    from kvhybrid.cache.step import Tokens
    from kvhybrid.config import KVCacheConfig

__all__ = ["SaidOfTexts"]


class SaidOfTexts:
    """The part of ``KVCache`` that speaks of texts and holds none."""

    config: KVCacheConfig
    pool: PagePool
    _namespaces: Namespaces

    def explain(self, tokens: Tokens, *, tenant: str = "default") -> Explanation:
        """Say why a text is not found, or not all of it. Changes nothing.

        ``tokens``: int32 or int64, of one dimension. Of several models over one cache, the one that knows
        most of the text counts. Raises ``ValueError`` for what are no token ids.
        """
        return explain(self.pool, tokens, self._numbers_of(tenant))

    def retain(
        self,
        tokens: Tokens,
        *,
        tenant: str = "default",
        start: int = 0,
        stop: int | None = None,
        priority: int = 0,
        ttl_s: float | None = None,
    ) -> int:
        """Have ``tokens[start:stop]``, as far as they are cached, leave before or after other texts.

        Lower priorities (-100 to 100, 0 the usual one) leave before higher ones. With ``ttl_s`` a page leaves
        after all else of its priority until that is over, and before everything then, unless it is in use, or
        used again: it is as any other from then on. In whole blocks; what stands before the range stays as
        long as it does. What was said of it before is replaced: called without either, the text is as any
        other.

        Returns how many leading tokens are cached and end the range, or lie before it: less than ``stop``
        where the rest is not. Raises ``InvalidRequestError`` for what is out of range.
        """
        numbers = self._numbers_of(tenant)
        return Retentions(self.pool, numbers).retain(tokens, start, stop, Retention(priority, ttl_s))

    def pin(self, tokens: Tokens, *, tenant: str = "default", ttl_s: float | None = None) -> Pin:
        """Pin a text as far as it is cached: its pages neither leave nor step down.

        Until the returned handle is released (``release()``) or dropped, ``ttl_s`` seconds are over, or the
        model changes. Raises ``CapacityError`` with the numbers beyond ``max_pinned_share`` of the budget,
        ``InvalidRequestError`` when nothing is cached.
        """
        return Retentions(self.pool, self._numbers_of(tenant)).pin(tokens, ttl_s)

    def _numbers_of(self, tenant: str) -> list[int]:
        return self._namespaces.of_tenant(tenant if self.config.tenant_isolation else "")
