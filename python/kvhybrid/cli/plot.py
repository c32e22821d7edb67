"""A line chart as SVG text: curves over a logarithmic axis, without a plotting library."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 760, 440
LEFT, TOP, BOTTOM = 60, 20, 50
RIGHT = 230
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
"""Told apart by colour-blind readers, too (Okabe and Ito)."""


def plot_curves(curves: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str) -> str:
    """Return an SVG of ``curves`` (name to points, ``x`` above 0): ``x`` logarithmic, ``y`` from 0 up."""
    points = [point for curve in curves.values() for point in curve]
    low, high = min(p[0] for p in points), max(p[0] for p in points)
    low, high = math.floor(math.log10(low)), max(math.ceil(math.log10(high)), math.floor(math.log10(low)) + 1)
    top = max(10 * math.ceil(max(p[1] for p in points) / 10), 10)

    def across(value: float) -> float:
        return LEFT + (math.log10(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}">',
        '<g font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for power in range(low, high + 1):
        at = across(10**power)
        parts.append(_line(at, TOP, at, HEIGHT - BOTTOM, "#ddd"))
        parts.append(_text(at, HEIGHT - BOTTOM + 18, f"{10**power:,}", "middle"))
    for tick in range(0, top + 1, max(10, 10 * (top // 50))):
        parts.append(_line(LEFT, up(tick), WIDTH - RIGHT, up(tick), "#ddd"))
        parts.append(_text(LEFT - 8, up(tick) + 4, str(tick), "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x, "middle"))
    parts.append(
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y)}</text>'
    )
    for index, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[index % len(COLOURS)]
        places = [(across(a), up(b)) for a, b in sorted(curve)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.extend(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in places)
        at = TOP + 16 * (index + 1)
        parts.append(_line(WIDTH - RIGHT + 10, at - 4, WIDTH - RIGHT + 28, at - 4, colour))
        parts.append(_text(WIDTH - RIGHT + 34, at, name, "start"))
    return "\n".join([*parts, "</g></svg>", ""])


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
