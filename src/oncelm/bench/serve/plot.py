"""A replay as a picture: how latencies are distributed, and what went on when."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from oncelm.bench.serve.figures import TITLES, values_of, whole
from oncelm.bench.serve.play import Answer
from oncelm.utils.errors import check_choice
from oncelm.utils.files import atomic_file

FORMATS = ("png", "svg")
BINS = 60  # of the timeline


def check_plot(path: str | os.PathLike[str]) -> None:
    """Before hours of work: ImportError without matplotlib, ValueError for a name that is no picture's."""
    check_choice("format of a plot", _format(path), FORMATS)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'oncelm[plot]'") from error


def plot_replay(answers: Sequence[Answer], path: str | os.PathLike[str], title: str) -> None:
    """Write a PNG or SVG, as the name ends: latencies of whole answers above, the timeline below.

    Raises:
        ImportError, ValueError: as `check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(title)
    (first, between), (busy, rate) = figure.subplots(2, 2)
    values = values_of(answers)
    _draw_distributions(first, values, ("queue_time", "ttft", "e2e"), "of a request")
    _draw_distributions(between, values, ("tpot", "inter_token_latency"), "between tokens")
    _draw_timeline(busy, rate, whole(answers))
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format=_format(path))


def _format(path: str | os.PathLike[str]) -> str:
    return Path(path).suffix.removeprefix(".").lower()


def _draw_distributions(axes: Any, values: dict[str, list[float]], names: Sequence[str], title: str) -> None:
    """The share of values up to each, in per cent."""
    drawn = [name for name in names if values[name]]
    for name in drawn:
        found = np.sort(values[name])
        axes.step(found, np.linspace(100 / len(found), 100, len(found)), where="post", label=TITLES[name])
    axes.set(title=title, xlabel="seconds", ylabel="per cent within")
    if drawn and min(min(values[name]) for name in drawn) > 0:
        axes.set_xscale("log")
    _finish(axes, bool(drawn))


def _draw_timeline(busy: Any, rate: Any, answers: Sequence[Answer]) -> None:
    """Requests that wait and that are written, and output tokens a second, over the replay's time."""
    start = min((answer.times.arrival_time for answer in answers), default=0.0)
    ends = [answer.times.finished_time - start for answer in answers if answer.times.finished_time is not None]
    edges = np.linspace(0, max(ends, default=0.0) or 1.0, BINS + 1)

    def begun_by(name: str) -> np.ndarray:
        """Of how many answers that moment has come, at each edge."""
        moments = [moment - start for answer in answers if (moment := getattr(answer.times, name)) is not None]
        return np.searchsorted(np.sort(moments), edges, side="right")

    arrived, written, finished = map(begun_by, ("arrival_time", "first_token_time", "finished_time"))
    busy.plot(edges, arrived - written, label="before the first token")
    busy.plot(edges, written - finished, label="being written")
    busy.set(title="requests", xlabel="seconds from the start", ylabel="at once")
    moments, weights = [], []
    for answer in answers:
        times = answer.times.token_times
        moments += [moment - start for moment in times]
        weights += [answer.num_output_tokens / len(times)] * len(times) if times else []
    tokens, _ = np.histogram(moments, edges, weights=weights)
    rate.step(edges[:-1], tokens / np.diff(edges), where="post", label="output tokens/s")
    rate.set(title="throughput", xlabel="seconds from the start", ylabel="output tokens/s")
    _finish(busy, True)
    _finish(rate, False)


def _finish(axes: Any, legend: bool) -> None:
    axes.grid(alpha=0.3)
    if legend:
        axes.legend()
