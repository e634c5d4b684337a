"""A report: one HTML page that needs nothing else, readable on a phone; tapping a heatmap's cell shows its samples."""

from __future__ import annotations

import html
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from string import Template
from typing import Any

from oncelm.eval.chart import COLOURS, HEAT, draw
from oncelm.eval.results import Run
from oncelm.eval.task import default_views
from oncelm.eval.tasks import TASKS
from oncelm.eval.views import Curves, Heatmap, Table, View, tokens
from oncelm.utils.files import atomic_file

SHOWN_CHARACTERS = 400  # of a target or output
SAMPLES_IN_PAGE = 5000  # of a run
NAMED_BY_TABLES = ("fewshot", "scorer")  # settings that lm-eval's tables say themselves


def write_report(runs: Sequence[Run], path: str | os.PathLike[str], title: str = "Evaluation") -> None:
    """Write the page of these runs: a section a task, with all its models side by side.

    Raises:
        ValueError: no run with samples.
    """
    runs = shown_runs(runs)
    sections = sections_of(runs)
    body = "".join(_section(name, views, [r for r in runs if _task_name(r) == name], runs) for name, views in sections)
    template = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    samples = sum(len(run.samples) for run in runs)
    models = ", ".join(dict.fromkeys(run.label for run in runs))
    page = template.substitute(
        title=html.escape(title),
        subtitle=html.escape(f"{models}. {samples:,} samples in {len(runs)} runs."),
        body=body,
        data=_data(runs),
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def sections_of(runs: Sequence[Run]) -> list[tuple[str, list[View]]]:
    """The views of each task among the runs, in the order in which the tasks first come."""
    runs = shown_runs(runs)
    names = dict.fromkeys(_task_name(run) for run in runs)
    return [(name, _views(name, [run for run in runs if _task_name(run) == name])) for name in names]


def shown_runs(runs: Sequence[Run]) -> list[Run]:
    """Those with samples; where several are of one task and model, each is named for the settings that differ.

    Raises:
        ValueError: none has samples.
    """
    shown = [run for run in runs if run.samples]
    for run in runs:
        if not run.samples:
            warnings.warn(f"the run of {_task_name(run)} on {run.label} has no sample yet; left out.", stacklevel=3)
    if not shown:
        raise ValueError("a report needs at least one run with samples.")
    alike: dict[tuple[str, str], list[int]] = {}
    for number, run in enumerate(shown):
        alike.setdefault((_task_name(run), run.label), []).append(number)
    for numbers in alike.values():
        if len(numbers) > 1:
            for number, name in zip(numbers, _names([shown[i] for i in numbers]), strict=True):
                shown[number] = replace(shown[number], name=name)
    return shown


def _names(runs: Sequence[Run]) -> list[str]:
    """What is not the same in all of these; a number for those that have all settings in common."""
    settings = [run.configuration["options"] | run.configuration["model"] for run in runs]
    settings = [{key: value for key, value in one.items() if key != "weights"} for one in settings]  # too long a name
    keys = dict.fromkeys(key for one in settings for key in one if key not in NAMED_BY_TABLES)
    differing = [key for key in keys if any(one.get(key) != settings[0].get(key) for one in settings)]
    names = []
    for number, own in enumerate(settings):
        words = [f"{key} {_option(own[key])}" for key in differing if own.get(key) not in ("", None)]
        if settings.count(own) > 1:
            words.append(f"run {1 + settings[:number].count(own)}")
        names.append(", ".join(words))
    return names


def _views(name: str, runs: Sequence[Run]) -> list[View]:
    if name in TASKS:
        return TASKS[name].views(runs)
    tags = tuple(next(iter(runs[0].samples.values()))["tags"])  # a task that somebody added: a table of all its tags
    return default_views(name, tags, runs)


def _task_name(run: Run) -> str:
    return run.configuration["task"]


# -- parts of the page ------------------------------------------------------------------------------------------------


def _section(name: str, views: Sequence[View], own: Sequence[Run], runs: Sequence[Run]) -> str:
    shown = "".join(_view(view, runs) for view in views)
    described = "".join(_about(run, runs.index(run)) for run in own)
    return f"<section><h2>{html.escape(name)}</h2>{shown}{described}</section>\n"


def _view(view: View, runs: Sequence[Run]) -> str:
    if isinstance(view, Table):
        return _table(view)
    if isinstance(view, Heatmap):
        return _heatmap(view, runs.index(view.run) if view.run in runs else None)
    return _figure(view.title, draw(view) + _legend(view), view.note)


def _figure(title: str, content: str, note: str = "") -> str:
    caption = f"<figcaption>{html.escape(note)}</figcaption>" if note else ""
    return f"<figure><h3>{html.escape(title)}</h3>{content}{caption}</figure>\n"


def _table(table: Table) -> str:
    head = "".join(f"<th scope=col>{html.escape(cell)}</th>" for cell in table.header)
    rows = "".join(f"<tr>{_cells(row)}</tr>" for row in table.rows)
    for number, row in enumerate(table.quoted):
        rows += f'<tr class="quoted{" border" if number == 0 else ""}">{_cells(row)}</tr>'
    note = f"{table.note} In italics: as published." if table.quoted else table.note
    content = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
    return _figure(table.title, content, note)


def _cells(row: Sequence[str]) -> str:
    return "".join(f"<td>{html.escape(cell)}</td>" for cell in row)


def _heatmap(view: Heatmap, run: int | None) -> str:
    show_x = tokens if view.x_tag == "context_length" else _number
    head = "".join(f"<th scope=col>{show_x(x)}</th>" for x in view.xs)
    rows = ""
    for y, values, counts in zip(view.ys, view.values, view.counts, strict=True):
        cells = "".join(
            _cell(view, run, x, y, value, count) for x, value, count in zip(view.xs, values, counts, strict=True)
        )
        rows += f"<tr><th scope=row>{_number(y)}</th>{cells}</tr>"
    corner = f"<th>{html.escape(view.y_label)} \\ {html.escape(view.x_label)}</th>"
    table = f'<table class="map"><thead><tr>{corner}{head}</tr></thead><tbody>{rows}</tbody></table>'
    return _figure(view.title, f'<div class="scroll">{table}</div>', "Share found; tap a cell for its samples.")


def _cell(view: Heatmap, run: int | None, x: float, y: float, value: float | None, count: int) -> str:
    if value is None:
        return "<td></td>"
    red, green, blue = _colour(value)
    data = f' data-run="{run}"' if run is not None else ""
    where = f'data-x-tag="{view.x_tag}" data-x="{_number(x)}" data-y-tag="{view.y_tag}" data-y="{_number(y)}"'
    title = f"{view.x_label} {_number(x)}, {view.y_label} {_number(y)}: {value:.2f} of {count}"
    return (
        f'<td><button type="button"{data} {where} title="{html.escape(title)}" aria-pressed="false" '
        f'style="background:rgb({red},{green},{blue})">{value:.2f}</button></td>'
    )


def _colour(value: float) -> tuple[int, int, int]:
    """From low over middle to high."""
    low, middle, high = HEAT
    start, end, share = (low, middle, 2 * value) if value < 0.5 else (middle, high, 2 * value - 1)
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(start, end, strict=True))
    return red, green, blue


def _legend(view: Curves) -> str:
    items = "".join(
        f'<span><i style="background:{COLOURS[i % len(COLOURS)]}"></i>{html.escape(label)}</span>'
        for i, label in enumerate(view.series)
    )
    return f'<p class="legend">{items}</p>'


def _about(run: Run, number: int) -> str:
    """What a run was, and its samples."""
    model, environment = run.configuration["model"], run.header["environment"]
    chosen = {key: value for key, value in run.configuration["options"].items() if value not in ("", None)}
    options = ", ".join(f"{key} {_option(value)}" for key, value in chosen.items())
    gpus = environment["gpus"]
    hardware = gpus[0]["name"] if run.header["device"].startswith("cuda") and gpus else environment["cpu"]
    facts = (
        f"{model['type']}, {model['parameters'] / 1e6:,.1f}M parameters, {model['dtype']}, weights {model['weights']}; "
        f"{options}; seed {run.configuration['seed']}; {hardware}, torch {environment['torch']}, "
        f"transformers {environment['transformers']}; {run.header['time']}"
    )
    state = "" if run.complete else " (not finished)"
    return (
        f"<p><b>{html.escape(run.label)}</b>{state}: {html.escape(facts)}</p>"
        f'<details data-run="{number}"><summary>{len(run.samples):,} samples of {html.escape(run.label)}</summary>'
        '<div class="samples"></div></details>\n'
    )


def _option(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _data(runs: Sequence[Run]) -> str:
    """The samples for the page's script; `<` is spelled so that no text can end the script element."""
    shown = [[_sample(sample) for sample in list(run.samples.values())[:SAMPLES_IN_PAGE]] for run in runs]
    return json.dumps(shown).replace("<", "\\u003c")


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    kept = {name: sample[name] for name in ("tags", "prompt_tokens", "prompt_hash")}
    texts = {name: sample[name] and sample[name][:SHOWN_CHARACTERS] for name in ("target", "output")}
    return {**kept, **texts, "scores": {k: v for k, v in sample["scores"].items() if not isinstance(v, list)}}


def _number(value: float) -> str:
    """As JavaScript's String() writes it."""
    return f"{round(value, 4):g}" if isinstance(value, float) else str(value)
