"""``Grid``: where forward passes end with ``reproducible``, and how much of a text was computed that way.

A warm answer is bit-equal to a cold one when both make the same calls: so a prompt is computed in passes of
one width from its first token on, and only what such a full pass computed is ever shared.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvhybrid.model.rows import Rows

# Tokens of a pass: long enough that a prefill costs little more, short enough that most of a prompt lies
# before the last multiple.
GRID = 512


class Grid:
    """One session's place on the grid. ``width``: tokens of a pass, 0 for no grid."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.exact = 0
        """Columns computed on the grid, from the first one on."""
        self.is_shared = True
        """False once the rows are others than those that were opened: they add up in another order."""

    def begin(self, columns: int) -> None:
        """Begin with ``columns`` that were found."""
        self.exact, self.is_shared = columns, True

    def follow(self, other: Grid) -> None:
        """Stand where ``other`` does."""
        self.exact, self.is_shared = other.exact, other.is_shared

    def stops(self, start: int, stop: int) -> list[int]:
        """Return the columns between ``start`` and ``stop`` at which passes must end."""
        return list(range(start - start % self.width + self.width, stop, self.width)) if self.width else []

    def bound(self, rows: Rows, width: int) -> None:
        """Let others find nothing but what is on the grid, once the next ``width`` columns are computed."""
        if self.width:
            rows.share_up_to(self.exact + (width if self._fits(rows, width) else 0))

    def advance(self, rows: Rows, width: int) -> None:
        """Note that ``width`` columns behind ``rows`` were computed; before their length is told."""
        if self.width and self._fits(rows, width):
            self.exact += width

    def crop(self, columns: int) -> None:
        """Note that columns from ``columns`` on are gone."""
        self.exact = min(self.exact, columns)

    def is_exact(self, columns: int) -> bool:
        """Return whether all of ``columns`` columns may be shared."""
        return not self.width or columns <= self.exact

    def _fits(self, rows: Rows, width: int) -> bool:
        return self.is_shared and rows.columns == self.exact and width == self.width
