"""What users say of texts: before which others they leave, until when they are wanted, and that they stay.

Reads and refuses; who leaves then is the pool's to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from kvhybrid.errors import InvalidRequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvhybrid._core import PagePool, Pin
    from kvhybrid.cache.step import Tokens

__all__ = ["MOST_PRIORITY", "Retention", "Retentions"]

MOST_PRIORITY: Final = 100
MOST_TTL_S: Final = 1e9


@dataclass(frozen=True, slots=True)
class Retention:
    """How long a text is wanted. Raises ``InvalidRequestError`` naming what is out of range."""

    priority: int = 0
    """Lower ones leave before higher ones, -100 to 100; 0 is that of all that nobody spoke of."""
    ttl_s: float | None = None
    """Until it is over, it leaves after all else of its priority; then it is the first to leave."""

    def __post_init__(self) -> None:
        if type(self.priority) is not int or abs(self.priority) > MOST_PRIORITY:
            allowed = f"a whole number from {-MOST_PRIORITY} to {MOST_PRIORITY}"
            raise InvalidRequestError(f"priority={self.priority!r}: must be {allowed}")
        check_ttl(self.ttl_s)

    @classmethod
    def of(cls, priority: int, ttl_s: float | None) -> Self | None:
        """Return it, or None for what is retained as everything is."""
        retention = cls(priority, ttl_s)
        return None if retention == cls() else retention


def check_ttl(ttl_s: object) -> None:
    """Raise ``InvalidRequestError`` unless it is None or seconds that can be."""
    is_number = isinstance(ttl_s, int | float) and not isinstance(ttl_s, bool)
    if ttl_s is not None and not (is_number and 0 <= ttl_s <= MOST_TTL_S):  # type: ignore[operator]  # a number
        raise InvalidRequestError(f"ttl_s={ttl_s!r}: must be a number of seconds from 0 to {MOST_TTL_S:.0f}")


class Retentions:
    """What can be said of the texts of some namespaces: the one that knows most of a text is meant."""

    def __init__(self, pool: PagePool, namespaces: Sequence[int]) -> None:
        self._pool = pool
        self._namespaces = namespaces

    def retain(self, tokens: Tokens, start: int, stop: int | None, retention: Retention) -> int:
        """Retain ``tokens[start:stop]`` as far as they are cached; return up to which token it holds."""
        for name, value in (("start", start), ("stop", stop)):
            if value is not None and (type(value) is not int or value < 0):
                raise InvalidRequestError(f"{name}={value!r}: must be a whole number of at least 0")
        if start > (stop if stop is not None else len(tokens)) or start > len(tokens):
            raise InvalidRequestError(f"start={start}: lies behind stop={stop}, or {len(tokens)} tokens")
        namespace = self._most_of(tokens)
        return self._pool.retain(
            tokens,
            namespace,
            start=start,
            stop=stop,
            priority=retention.priority,
            ttl_s=retention.ttl_s,
        )

    def pin(self, tokens: Tokens, ttl_s: float | None) -> Pin:
        """Pin ``tokens`` as far as they are cached."""
        check_ttl(ttl_s)
        namespace = self._most_of(tokens)
        if not self._pool.match(tokens, namespace):
            raise InvalidRequestError(
                f"nothing of these {len(tokens)} tokens is cached: there is nothing to pin"
            )
        return self._pool.pin(tokens, namespace, ttl_s=ttl_s)

    def _most_of(self, tokens: Tokens) -> int:
        # The first is a number that is never given out: asked to refuse what are no token ids.
        return max([2**64 - 1, *self._namespaces], key=lambda number: self._pool.match(tokens, number))
