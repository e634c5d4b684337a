"""The tasks, by name. A task is a frozen dataclass: docs/evaluation.md shows how to write one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from oncelm.eval.harness.suite import AnyTasks, LongLlamaTable, YocoTable
from oncelm.eval.task import Task
from oncelm.eval.tasks.ar_hit import ArHit
from oncelm.eval.tasks.context_nll import ContextNll
from oncelm.eval.tasks.in_context import Trec, WebQs
from oncelm.eval.tasks.longppl import LongPpl
from oncelm.eval.tasks.needle import MultiNeedle, Needle
from oncelm.eval.tasks.nll import Nll
from oncelm.eval.tasks.passkey import Passkey
from oncelm.eval.tasks.ruler import Ruler
from oncelm.utils.errors import unknown

_ALL = (
    *(Needle, MultiNeedle, Passkey, Ruler, Nll, ContextNll, ArHit, LongPpl, Trec, WebQs),
    *(YocoTable, LongLlamaTable, AnyTasks),
)
TASKS: dict[str, type[Task]] = {task.name: task for task in _ALL}


def find_task(name: str) -> type[Task]:
    """The task of that name, or the one that a Python file defines.

    Raises:
        ValueError: no such task (with the nearest name), no such file, or not exactly one task in it.
    """
    if not name.endswith(".py"):
        if name not in TASKS:
            raise unknown("task", name, TASKS)
        return TASKS[name]
    path = Path(name)
    if not path.is_file():
        raise ValueError(f"task file {name!r} does not exist.")
    import oncelm.models  # noqa: F401  the file may use transformers' Auto classes, which then know them

    spec = importlib.util.spec_from_file_location(f"oncelm_task_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up what annotations name
    spec.loader.exec_module(module)
    own = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise ValueError(f"{name} must define one task, a subclass of oncelm.eval.Task; it defines {len(own)}.")
    return own[0]
