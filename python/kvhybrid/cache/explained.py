"""Why a text is not found, and who says which pages leave: the pool's answers in words and numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvhybrid._core import PagePool
    from kvhybrid.cache.step import Tokens


@dataclass(frozen=True, slots=True)
class Explanation:
    """What is cached of a text, and what became of the rest. The three counts add up to its length."""

    cached: int
    """Leading tokens that are cached."""
    evicted: int
    """Tokens behind them that were cached and left, as far as that is remembered."""
    unseen: int
    """The rest: computed for nobody yet, or so long ago that it is forgotten."""
    evicted_by: str | None
    """``lru`` or ``survival`` when room was needed, by who ruled; ``ttl`` when its time was over,
    ``priority`` when that was lower than the usual one; ``asked`` when cleared; None when nothing was
    evicted."""
    evicted_s_ago: float | None
    """How long ago the first of the evicted blocks left."""

    @property
    def diverged_at(self) -> int | None:
        """The position from which on nothing like it is known, behind a beginning that is; else None."""
        known = self.cached + self.evicted
        return known if known and self.unseen else None

    def __str__(self) -> str:
        parts = [f"{self.cached} tokens cached"]
        if self.evicted:
            parts.append(f"{self.evicted} evicted {self.evicted_s_ago:.1f} s ago ({self.evicted_by})")
        if self.diverged_at is not None:
            parts.append(f"diverged at token {self.diverged_at}")
        elif self.unseen:
            parts.append("never seen")
        return ", ".join(parts)


def explain(pool: PagePool, tokens: Tokens, namespaces: Sequence[int]) -> Explanation:
    """Return the explanation of the namespace that knows most of ``tokens``; of none, never seen."""
    # A number that is never given out: asked for the length, and to refuse what are no token ids.
    found = [Explanation(**pool.explain(tokens, namespace)) for namespace in [2**64 - 1, *namespaces]]
    return max(found, key=lambda each: (each.cached + each.evicted, each.cached))


def ruling(pool: PagePool) -> dict[str, int | float]:
    """Return who rules, and why, as flat numbers; nothing where the pool does not learn."""
    rule: dict[str, Any] = pool.rule()
    learned = rule.pop("ruling") == "survival"
    return {"learned_order_rules": int(learned), **rule} if rule else {}
