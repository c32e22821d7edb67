"""What ``kvhybrid bench`` shows: a table a comparison, and all of it as figures."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeAlias

from rich import box
from rich.table import Table

from kvhybrid.cli.bench_model import OURS, Comparison
from kvhybrid.report import machine, versions

if TYPE_CHECKING:
    from rich.console import Console

Facts: TypeAlias = "dict[str, str | float]"
"""What there is to say of a model before anything is measured; numbers are figures, too."""


def show(console: Console, found: list[Comparison], facts: Facts) -> None:
    """Print the facts, a table a comparison, and what is to be said of it."""
    here = machine()
    full, eight, four = (facts[f"{name}bytes_per_token"] for name in ("", "int8_", "int4_"))
    for line in (
        f"{facts['model']}, {facts['dtype']} on {facts['device']}, {facts['route']} route",
        f"{here['cpu']}, {here['cores']} cores",
        ", ".join(f"{name} {version}" for name, version in versions().items()),
        f"K and V of a token: {full:,.0f} bytes, {eight:,.0f} in 8 bits, {four:,.0f} in 4",
    ):
        console.print(line, highlight=False, markup=False)
    for comparison in found:
        console.print(_table(comparison))
        for way, why in comparison.left_out.items():
            console.print(f"left out: {way}: {why}", markup=False)
        if not comparison.equal:
            exact = facts["dtype"] == "float32"
            says = (
                "[red]the tokens differ[/]" if exact else "the tokens differ somewhere: sums round otherwise"
            )
            console.print(says)


def _table(comparison: Comparison) -> Table:
    table = Table(
        title=comparison.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False
    )
    table.add_column("", no_wrap=True, min_width=26)
    table.add_column("median", justify="right", no_wrap=True)
    table.add_column("times ours", justify="right", no_wrap=True)
    ours = comparison.seconds[OURS]
    for way, seconds in comparison.seconds.items():
        table.add_row(way, f"{seconds * 1e3:,.2f} ms", f"{seconds / ours:.2f}")
    return table


def figures(found: list[Comparison], facts: Facts) -> dict[str, float]:
    """Return medians in milliseconds, our time as a share of every other way's, and whether tokens agree."""
    numbers = {name: value for name, value in facts.items() if isinstance(value, float)}
    for comparison in found:
        for way, seconds in comparison.seconds.items():
            name = re.sub(r"\W+", "_", way.lower())
            numbers[f"{comparison.name}_{name}_ms"] = seconds * 1e3
            if way != OURS:
                numbers[f"{comparison.name}_vs_{name}"] = comparison.seconds[OURS] / seconds
        numbers[f"{comparison.name}_equal"] = float(comparison.equal)
    return numbers
