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

LONGEST_NAME = 100  # characters of a name in a drawing, and of each part of a file's name


def check_plotting() -> None:
    """ImportError, with what to install, where matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("PNGs need matplotlib: pip install 'oncelm[plot]'") from error


def write_pngs(views: Sequence[View], folder: str | os.PathLike[str], prefix: str) -> list[Path]:
    """One PNG a heatmap or curves in `folder`, named for its title; of equal titles, the second one's ends in -2.

    Raises:
        ImportError: matplotlib is not installed.
    """
    check_plotting()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    written: list[Path] = []
    used: Counter[str] = Counter()
    for view in views:
        if not isinstance(view, Heatmap | Curves):
            continue
        name = "-".join(filter(None, map(_file_name, (prefix, view.title))))
        used[name] += 1
        path = Path(folder) / f"{name}{f'-{used[name]}' if used[name] > 1 else ''}.png"
        with rc_context({"text.parse_math": False}), atomic_file(path) as temporary:  # a name may hold any characters
            figure = Figure(figsize=(8, 4.5), layout="constrained")
            axes = figure.subplots()
            axes.set(title=_label(view.title), xlabel=view.x_label, ylabel=view.y_label)
            if isinstance(view, Heatmap):
                _heatmap(figure, axes, view)
            else:
                _curves(axes, view)
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
    for label, points in view.drawn().items():
        (line,) = axes.plot([x for x, _ in points], [y for _, y in points], marker="o", markersize=3)
        line.set_label(_label(label))
    if view.log_x:
        axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()


def _label(text: str) -> str:
    """A name that leaves room for the drawing, and that matplotlib does not hide for its first letter."""
    text = text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}..."
    return f" {text}" if text.startswith("_") else text


def _file_name(title: str) -> str:
    """Letters of any title or task that a file's name may hold."""
    return re.sub(r"[^a-z0-9_]+", "-", title.lower()).strip("-")[:LONGEST_NAME]
