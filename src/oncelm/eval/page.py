"""A report: one HTML page that needs nothing else, readable on a phone; tapping a heatmap's cell shows its samples."""

from __future__ import annotations

import base64
import hashlib
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from oncelm.eval.chart import COLOURS, draw, heat
from oncelm.eval.fields import check_header, check_sample
from oncelm.eval.results import Run
from oncelm.eval.task import checked_views, default_views
from oncelm.eval.tasks import TASKS
from oncelm.eval.templating import ENVIRONMENT, source
from oncelm.eval.views import View, tokens
from oncelm.utils.files import atomic_file

SHOWN_CHARACTERS = 400  # of a target or output
SAMPLES_IN_PAGE = 5000  # of a run
NAMED_BY_TABLES = ("fewshot", "scorer")  # settings that lm-eval's tables say themselves


def write_report(runs: Sequence[Run], path: str | os.PathLike[str], title: str = "Evaluation") -> list[Run]:
    """Write the page of these runs: a section a task, with all its models side by side.

    Returns:
        The runs as they are shown (`shown_runs`).

    Raises:
        ValueError: no run with samples; a run or sample lacks what the page shows.
    """
    runs = shown_runs(runs)
    sections = [
        {"name": name, "views": views, "runs": [run for run in runs if _task_name(run) == name]}
        for name, views in sections_of(runs)
    ]
    for run in runs:
        _check(run)
    samples = sum(len(run.samples) for run in runs)
    models = ", ".join(dict.fromkeys(run.label for run in runs))
    style, script = source("page.css") + _colours(), source("page.js")
    page = ENVIRONMENT.get_template("page.html").render(
        title=title,
        subtitle=f"{models}. {samples:,} samples in {len(runs)} runs.",
        sections=sections,
        runs=runs,
        samples=[[_sample(sample) for sample in list(run.samples.values())[:SAMPLES_IN_PAGE]] for run in runs],
        colours=len(COLOURS),
        style=Markup(style),
        script=Markup(script),
        policy=_policy(style, script),
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return runs


def sections_of(runs: Sequence[Run]) -> list[tuple[str, list[View]]]:
    """The views of each task among `shown_runs`, in the order in which the tasks first come."""
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
        return checked_views(TASKS[name], runs)
    tags = tuple(
        next(iter(runs[0].samples.values())).get("tags", ())
    )  # a task that somebody added: a table of all its tags
    return default_views(name, tags, runs)


def _task_name(run: Run) -> str:
    return run.configuration["task"]


# -- parts of the page ------------------------------------------------------------------------------------------------


def _check(run: Run) -> None:
    """ValueError unless there is all that the page says of a run and its samples."""
    try:
        check_header(run.header, needed=True)
    except ValueError as error:
        raise ValueError(f"{run.where()}: {error}") from None
    for index, sample in run.samples.items():
        try:
            check_sample(sample, needed=True)
        except ValueError as error:
            raise ValueError(f"{run.where(index)}: {error}") from None


def _policy(style: str, script: str) -> str:
    """What a browser may do with the page: use this style and this script. It fetches, sends and runs nothing else."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script))
    allowed = [f"{name} 'sha256-{digest}'" for name, digest in zip(("style-src", "script-src"), hashes, strict=True)]
    return "; ".join(["default-src 'none'", *allowed, "base-uri 'none'", "form-action 'none'"])


def _colours() -> str:
    """The rules of the classes h0 to h100, a heatmap's cells, and c0, c1, ..., a legend's lines."""
    cells = [f".h{percent} {{ background: rgb{heat(percent / 100)}; }}" for percent in range(101)]
    lines = [f".c{number} {{ background: {colour}; }}" for number, colour in enumerate(COLOURS)]
    return "\n".join([*cells, *lines, ""])


def _facts(run: Run) -> str:
    """What a run was."""
    model, environment = run.configuration["model"], run.header["environment"]
    chosen = {key: value for key, value in run.configuration["options"].items() if value not in ("", None)}
    options = ", ".join(f"{key} {_option(value)}" for key, value in chosen.items())
    gpus = environment["gpus"]
    hardware = gpus[0]["name"] if run.header["device"].startswith("cuda") and gpus else environment["cpu"]
    return (
        f"{model['type']}, {model['parameters'] / 1e6:,.1f}M parameters, {model['dtype']}, weights {model['weights']}; "
        f"{options}; seed {run.configuration['seed']}; {hardware}, torch {environment['torch']}, "
        f"transformers {environment['transformers']}; {run.header['time']}"
    )


def _option(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    """As the page's script shows it."""
    kept = {name: sample[name] for name in ("tags", "prompt_tokens", "prompt_hash")}
    texts = {name: sample[name] and sample[name][:SHOWN_CHARACTERS] for name in ("target", "output")}
    return {**kept, **texts, "scores": {k: v for k, v in sample["scores"].items() if not isinstance(v, list)}}


def _number(value: float) -> str:
    """As JavaScript's String() writes it."""
    value = round(value, 4)
    return str(int(value)) if value == int(value) else repr(value)


ENVIRONMENT.filters.update(tokens=tokens, number=_number, facts=_facts, drawing=lambda view: Markup(draw(view)))
