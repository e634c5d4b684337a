"""Figures against length, one panel each, one line a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from oncelm.utils.files import atomic_file


@dataclass(frozen=True)
class Panel:
    """One quantity: the key in a row, the title, and the factor from the key's unit to the title's."""

    key: str
    title: str
    factor: float = 1.0


COMPARISON = (
    Panel("prefill_seconds", "prefill, seconds"),
    Panel("decode_tokens_per_second", "decoding, tokens/s"),
    Panel("cache_bytes", "cache, MiB", 2**-20),
    Panel("peak_bytes", "peak memory above weights, MiB", 2**-20),
)


def plot_by_length(
    rows: Sequence[dict[str, Any]], path: str | os.PathLike[str], title: str, panels: Sequence[Panel] = COMPARISON
) -> None:
    """Write a PNG of `rows`, each with "model", "length" (tokens) and the panels' keys.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'oncelm[plot]'") from error
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(title)
    models = list(dict.fromkeys(row["model"] for row in rows))
    lengths = sorted({row["length"] for row in rows})
    for axes, panel in zip(figure.subplots(2, -(-len(panels) // 2)).flat, panels, strict=False):
        for model in models:
            points = [(row["length"], row[panel.key] * panel.factor) for row in rows if row["model"] == model]
            axes.plot(*zip(*points, strict=True), marker="o", label=model)
            for point in points:  # figures as numbers: on a logarithmic axis they are hard to read off
                axes.annotate(f"{point[1]:.3g}", point, xytext=(0, 6), textcoords="offset points", ha="center")
        axes.set(title=panel.title, xlabel="tokens in the context", xscale="log", yscale="log")
        axes.set_xticks(lengths, [f"{length / 1024:g}K" for length in lengths], minor=False)
        axes.minorticks_off()
        axes.margins(0.12)
        axes.grid(alpha=0.3)
        axes.legend()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
