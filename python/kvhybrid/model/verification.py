"""``Verification``: whether what a session computed is that of the model whose name its pages bear.

Others find pages once they are sealed, and pages are sealed only when the model was looked at after the pass
that computed them and was still what it was when the text was opened. If it was not, the text's pages are
never shared, and the next call computes the text again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvhybrid.cache.step import Step
    from kvhybrid.model.rows import Rows, Text

__all__ = ["Verification", "Weights"]


class Weights(Protocol):
    """What K and V depend on beside the tokens, and so whose pages a session may find."""

    def namespace(self, *parts: str, texts: Sequence[Text] = ()) -> int:
        """Look at the model and return the namespace in which ``texts`` are opened."""

    def follow(self, other: Self) -> None:
        """Take over the model's name under which ``other`` was opened, together with its pages."""

    def is_stale(self) -> bool:
        """Look at the model and return whether it has changed since ``namespace`` was last asked."""


class Verification:
    """What is known of one session's text: whether the model is still the one that computes it."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._is_pending = False  # something was computed since the last look
        self.is_stale = False
        """True once a look found that the model has changed since the text was opened."""

    def open(self, *parts: str, texts: Sequence[Text]) -> int:
        """Look at the model and return the namespace in which ``texts`` are opened."""
        namespace = self._weights.namespace(*parts, texts=texts)
        self.is_stale = self._is_pending = False
        return namespace

    def look(self) -> bool:
        """Look at the model and return ``is_stale``."""
        self.is_stale = self.is_stale or self._weights.is_stale()
        return self.is_stale

    def verify(self, rows: Rows, step: Step) -> bool:
        """Note a step that was computed; if it fills blocks, look and let them be sealed.

        Returns whether everything that ``rows`` hold is verified.
        """
        self._is_pending = not step.fills_blocks or self.look()
        if not self._is_pending:
            rows.verify(step)
        return not self._is_pending

    def settle(self, rows: Rows) -> None:
        """Look, before ``rows`` are closed, and let what was computed since the last look be sealed."""
        if self._is_pending and not self.look():
            rows.verify(None)
            self._is_pending = False

    def follow(self, other: Verification) -> None:
        """Take over what is known of ``other``'s text, together with its pages."""
        self._weights.follow(other._weights)
        self.is_stale, self._is_pending = other.is_stale, other._is_pending
