"""Results as shares of correct answers by length, and as a picture of them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from oncelm.utils.files import atomic_file


def accuracy_by_length(results: Iterable[dict[str, Any]]) -> dict[int, tuple[int, int]]:
    """length -> (correct, all)."""
    counts: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    for result in results:
        counts[result["key"]["length"]][0] += bool(result["correct"])
        counts[result["key"]["length"]][1] += 1
    return {length: (right, total) for length, (right, total) in sorted(counts.items())}


def plot_accuracy(results: Iterable[dict[str, Any]], title: str, file: str | os.PathLike[str]) -> None:
    """A PNG of accuracy against length; ImportError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'oncelm[plot]'") from error
    table = accuracy_by_length(results)
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot()
    shares = [right / total for right, total in table.values()]
    axes.plot(list(table), shares, marker="o")
    for length, share in zip(table, shares, strict=True):
        axes.annotate(f"{share:.2f}", (length, share), textcoords="offset points", xytext=(0, 6), ha="center")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(table), [f"{length / 1024:g}K" for length in table])
    axes.set_ylim(-0.05, 1.15)
    axes.set(title=title, xlabel="tokens", ylabel="accuracy")
    axes.grid(alpha=0.3)
    with atomic_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
