"""How good a model is, and at what length: tasks, result files, reports. docs/evaluation.md explains them.

model = LanguageModel(oncelm.load(path), oncelm.load_tokenizer(path), "mine")
done = run(make_task(TASKS["needle"], lengths=(4096,)), model, "needle.jsonl")
write_report([done], "report.html")
"""

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
