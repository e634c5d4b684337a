"""Curves as an SVG drawing, and the colours of all pictures."""

from __future__ import annotations

import html
import math
from collections.abc import Callable

from oncelm.eval.views import Curves, tokens

COLOURS = ("#1b6ca8", "#d9772b", "#3a9a5c", "#b2478f", "#8a6d3b", "#5b6570")
HEAT = ((230, 126, 67), (246, 242, 220), (104, 170, 214))  # 0, half, 1; told apart by colour-blind eyes too
WIDTH, HEIGHT = 480, 300  # drawn small enough that letters are readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 48, 18, 22, 50


def draw(view: Curves) -> str:
    """The drawing; each point tells its figures when pointed at."""
    points = [point for series in view.series.values() for point in series]
    if not points:
        return "<p>Nothing measured.</p>"
    x_of, x_ticks = _x_axis([x for x, _ in points], view.log_x)
    y_of, y_ticks = _y_axis([y for _, y in points])
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(view.title)}">']
    for y in y_ticks:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        parts.append(f'<text x="{x_of(x):.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tokens(x)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(view.x_label)}</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 8}">{html.escape(view.y_label)}</text>')
    for number, (label, series) in enumerate(view.series.items()):
        colour = COLOURS[number % len(COLOURS)]
        line = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in series)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in series:
            title = html.escape(f"{label}: {y:.4g} at {x:,.0f}")
            parts.append(
                f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3" fill="{colour}"><title>{title}</title></circle>'
            )
    return "".join([*parts, "</svg>"])


Scale = Callable[[float], float]


def _x_axis(xs: list[float], log: bool) -> tuple[Scale, list[float]]:
    scale = math.log2 if log else float
    low, high = min(map(scale, xs)), max(map(scale, xs))
    ticks = sorted(set(xs))
    if log:
        powers = range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)
        step = max(1, math.ceil(len(powers) / 7))
        ticks = [2.0**power for power in powers[::step]] if len(powers) > 2 else ticks[:7]
    span = (high - low) or 1.0
    return lambda x: LEFT + (scale(x) - low) / span * (WIDTH - LEFT - RIGHT), ticks


def _y_axis(ys: list[float]) -> tuple[Scale, list[float]]:
    low, high = min(ys), max(ys)
    if low == high:
        high = low + 1
    rough = (high - low) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = [round(i * step, 10) for i in range(first, last + 1)]
    bottom, span = first * step, (last - first) * step
    return lambda y: HEIGHT - BOTTOM - (y - bottom) / span * (HEIGHT - TOP - BOTTOM), ticks
