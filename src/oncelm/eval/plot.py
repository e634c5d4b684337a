"""Heatmaps and curves as PNG files."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from oncelm.eval.chart import HEAT
from oncelm.eval.views import Curves, Heatmap, View, tokens
from oncelm.utils.files import atomic_file


def write_pngs(views: Sequence[View], folder: str | os.PathLike[str], prefix: str) -> list[Path]:
    """One PNG a heatmap or curves in `folder`, named for its title; of equal titles, the second one's ends in -2.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("PNGs need matplotlib: pip install 'oncelm[plot]'") from error
    written: list[Path] = []
    used: Counter[str] = Counter()
    for view in views:
        if not isinstance(view, Heatmap | Curves):
            continue
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.set(title=view.title, xlabel=view.x_label, ylabel=view.y_label)
        if isinstance(view, Heatmap):
            _heatmap(figure, axes, view)
        else:
            _curves(axes, view)
        name = _file_name(view.title)
        used[name] += 1
        path = Path(folder) / f"{prefix}-{name}{f'-{used[name]}' if used[name] > 1 else ''}.png"
        with atomic_file(path) as temporary:
            figure.savefig(temporary, dpi=120, format="png")
        written.append(path)
    return written


def _heatmap(figure: Any, axes: Any, view: Heatmap) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    values = [[float("nan") if value is None else value for value in row] for row in view.values]
    colours = LinearSegmentedColormap.from_list("heat", [[part / 255 for part in colour] for colour in HEAT])
    drawn = axes.imshow(values, vmin=0, vmax=1, cmap=colours, aspect="auto")
    axes.set_xticks(range(len(view.xs)), [tokens(x) if view.x_tag == "context_length" else f"{x:g}" for x in view.xs])
    axes.set_yticks(range(len(view.ys)), [f"{y:g}" for y in view.ys])
    for row, cells in enumerate(view.values):
        for column, value in enumerate(cells):
            if value is not None:
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
    figure.colorbar(drawn, label="share found")


def _curves(axes: Any, view: Curves) -> None:
    for label, points in view.series.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    if view.log_x:
        axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()


def _file_name(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
