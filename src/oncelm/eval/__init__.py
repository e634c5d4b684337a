"""How good a model is, and at what length: tasks, result files, reports. docs/evaluation.md explains them.

model = LanguageModel(oncelm.load(path), oncelm.load_tokenizer(path), "mine")
done = run(make_task(TASKS["needle"], lengths=(4096,)), model, "needle.jsonl")
write_report([done], "report.html")
"""

from typing import TYPE_CHECKING

from oncelm.utils.lazy import lazy_names

if TYPE_CHECKING:
    from oncelm.eval.examples import Example, Generate, Output, Score, Scores, TokenScores
    from oncelm.eval.model import Codec, LanguageModel, Reader
    from oncelm.eval.page import write_report
    from oncelm.eval.results import Run, read_run
    from oncelm.eval.runner import run
    from oncelm.eval.statistics import Estimate, estimate
    from oncelm.eval.task import Task, make_task, option
    from oncelm.eval.tasks import TASKS, find_task
    from oncelm.eval.views import Curves, Heatmap, Table, View

__all__ = [
    "TASKS",
    "Codec",
    "Curves",
    "Estimate",
    "Example",
    "Generate",
    "Heatmap",
    "LanguageModel",
    "Output",
    "Reader",
    "Run",
    "Score",
    "Scores",
    "Table",
    "Task",
    "TokenScores",
    "View",
    "estimate",
    "find_task",
    "make_task",
    "option",
    "read_run",
    "run",
    "write_report",
]

__getattr__, __dir__ = lazy_names(  # `oncelm eval --help` needs no model
    __name__,
    {
        "oncelm.eval.examples": ("Example", "Generate", "Output", "Score", "Scores", "TokenScores"),
        "oncelm.eval.model": ("Codec", "LanguageModel", "Reader"),
        "oncelm.eval.page": ("write_report",),
        "oncelm.eval.results": ("Run", "read_run"),
        "oncelm.eval.runner": ("run",),
        "oncelm.eval.statistics": ("Estimate", "estimate"),
        "oncelm.eval.task": ("Task", "make_task", "option"),
        "oncelm.eval.tasks": ("TASKS", "find_task"),
        "oncelm.eval.views": ("Curves", "Heatmap", "Table", "View"),
    },
)
