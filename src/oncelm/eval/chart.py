"""Curves as an SVG drawing, and the colours of all pictures."""

from __future__ import annotations

import math
from collections.abc import Callable

from oncelm.eval.templating import ENVIRONMENT
from oncelm.eval.views import Curves, tokens

COLOURS = ("#1b6ca8", "#d9772b", "#3a9a5c", "#b2478f", "#8a6d3b", "#5b6570")
HEAT = ((230, 126, 67), (246, 242, 220), (104, 170, 214))  # 0, half, 1; told apart by colour-blind eyes too
WIDTH, HEIGHT = 480, 300  # drawn small enough that letters are readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 48, 18, 22, 50


def draw(view: Curves) -> str:
    """The drawing; each point tells its figures when pointed at."""
    series = view.drawn()
    points = [point for line in series.values() for point in line]
    if not points:
        return "<p>Nothing measured.</p>"
    x_of, x_ticks = _x_axis([x for x, _ in points], view.log_x)
    y_of, y_ticks = _y_axis([y for _, y in points])
    lines = [
        {
            "colour": COLOURS[number % len(COLOURS)],
            "points": [(_place(x_of(x)), _place(y_of(y)), f"{label}: {y:.4g} at {x:,.0f}") for x, y in line],
        }
        for number, (label, line) in enumerate(series.items())
    ]
    return ENVIRONMENT.get_template("chart.svg").render(
        view=view,
        lines=lines,
        x_ticks=[(_place(x_of(x)), tokens(x)) for x in x_ticks],
        y_ticks=[(_place(y_of(y)), f"{y:g}") for y in y_ticks],
        **{
            "width": WIDTH,
            "height": HEIGHT,
            "left": LEFT,
            "right": WIDTH - RIGHT,
            "top": TOP,
            "bottom": HEIGHT - BOTTOM,
        },
    )


def heat(share: float) -> tuple[int, int, int]:
    """The colour of a share from 0 to 1: red, green, blue."""
    low, middle, high = HEAT
    start, end, part = (low, middle, 2 * share) if share < 0.5 else (middle, high, 2 * share - 1)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(start, end, strict=True))
    return red, green, blue


def _place(pixels: float) -> float:
    return round(pixels, 1)


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
    bottom, span = first * step, (last - first) * step or 1.0
    return lambda y: HEIGHT - BOTTOM - (y - bottom) / span * (HEIGHT - TOP - BOTTOM), ticks
