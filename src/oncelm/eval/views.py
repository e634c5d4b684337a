"""What a report shows, as plain data: tables, heatmaps, curves. page.py, plot.py and the terminal draw them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from oncelm.eval.results import Run
from oncelm.eval.statistics import Estimate, estimate

Sample = dict[str, Any]
HIGHEST = 1e300  # of a drawing


@dataclass(frozen=True)
class Table:
    """Rows of text under a header; `quoted` are rows as published elsewhere, shown apart from measured ones."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    quoted: Sequence[Sequence[str]] = ()
    note: str = ""


@dataclass(frozen=True)
class Heatmap:
    """A share (0 to 1) for each x and y; `values[row of y][column of x]` is None where nothing was measured.

    `x_tag` and `y_tag` name the tags of the samples that a cell stands for, `run` their run.
    """

    title: str
    x_label: str
    y_label: str
    x_tag: str
    y_tag: str
    xs: Sequence[float]
    ys: Sequence[float]
    values: Sequence[Sequence[float | None]]
    counts: Sequence[Sequence[int]]
    run: Run


@dataclass(frozen=True)
class Curves:
    """Lines of (x, y) points by label."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    log_x: bool = True
    note: str = ""

    def drawn(self) -> dict[str, list[tuple[float, float]]]:
        """The points that a drawing can hold: a perplexity may be beyond all numbers."""
        return {label: [(x, y) for x, y in points if abs(y) < HIGHEST] for label, points in self.series.items()}


View = Table | Heatmap | Curves


def heatmap(run: Run, score: str, x_tag: str, y_tag: str, title: str, x_label: str, y_label: str) -> Heatmap:
    """The mean of a score over the samples of each pair of tags."""
    samples = list(run.samples.values())
    xs = sorted({sample["tags"][x_tag] for sample in samples})
    ys = sorted({sample["tags"][y_tag] for sample in samples})
    cells = group(samples, (x_tag, y_tag))
    found = [[[s["scores"][score] for s in cells.get((x, y), [])] for x in xs] for y in ys]
    values = [[sum(cell) / len(cell) if cell else None for cell in row] for row in found]
    counts = [[len(cell) for cell in row] for row in found]
    return Heatmap(title, x_label, y_label, x_tag, y_tag, xs, ys, values, counts, run)


def group(samples: Iterable[Sample], tags: Sequence[str]) -> dict[tuple, list[Sample]]:
    """Samples by the values of their tags, in the order in which they first came."""
    groups: dict[tuple, list[Sample]] = {}
    for sample in samples:
        groups.setdefault(tuple(sample["tags"].get(tag) for tag in tags), []).append(sample)
    return groups


def by_column(
    title: str,
    runs: Sequence[Run],
    score: str,
    column: str,
    *,
    show: Callable[[Estimate], str] = lambda e: percent(e),
    head: Callable[[Any], str] = str,
    quoted: dict[str, dict[Any, str]] | None = None,
    note: str = "",
) -> Table:
    """A row a run, a column a value of the tag `column`, beside published rows {label: {tag value: text}}."""
    quoted = quoted or {}
    measured = [group(run.samples.values(), (column,)) for run in runs]
    values = sorted({key[0] for groups in measured for key in groups})
    rows = [
        [
            run.label,
            *(show(estimate([s["scores"][score] for s in groups[v,]])) if (v,) in groups else "" for v in values),
        ]
        for run, groups in zip(runs, measured, strict=True)
    ]
    published = [[label, *(row.get(v, "") for v in values)] for label, row in quoted.items()]
    published = [row for row in published if any(row[1:])]
    return Table(title, ["model", *(head(value) for value in values)], rows, published, note)


def percent(e: Estimate) -> str:
    """ "0.95 (0.89-0.98)"."""
    return f"{e.mean:.2f}{_interval(e, '.2f')}"


def plain(e: Estimate) -> str:
    """ "3.530 (3.512-3.549)"."""
    return f"{e.mean:.3f}{_interval(e, '.3f')}"


def perplexity(e: Estimate) -> str:
    """Of a mean loss in nats: "5.43 (5.31-5.56)"."""
    interval = "" if math.isnan(e.low) else f" ({show_perplexity(e.low)}-{show_perplexity(e.high)})"
    return f"{show_perplexity(e.mean)}{interval}"


def show_perplexity(nats: float) -> str:
    """ "5.43"; the largest ones with an exponent."""
    value = exponential(nats)
    return f"{value:.2f}" if value < 1e6 else f"{value:.3g}"


def exponential(nats: float) -> float:
    """e to that power; infinite where a float cannot hold it."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def _interval(e: Estimate, form: str) -> str:
    return "" if math.isnan(e.low) else f" ({e.low:{form}}-{e.high:{form}})"


def tokens(count: float) -> str:
    """A length as in tables: 4K, 1M, 1,500."""
    for unit, factor in (("M", 1 << 20), ("K", 1 << 10)):
        if count and count % factor == 0:
            return f"{count // factor:.0f}{unit}"
    return f"{count:,.0f}"
