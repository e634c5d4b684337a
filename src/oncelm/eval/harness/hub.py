"""lm-eval's own tasks, whose data come from the hub or from its cache on this machine."""

from __future__ import annotations

import contextlib
import difflib
import functools
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

SECONDS_TO_ANSWER = 5.0


def hub_tasks(names: Sequence[str], fewshot: int) -> dict[str, ConfigurableTask]:
    """lm-eval's own tasks; their data come from the hub or its cache."""
    manager = _task_manager()
    for name in names:
        if name not in manager.all_tasks:  # thousands: the nearest few are enough
            near = difflib.get_close_matches(name, manager.all_tasks, n=5)
            hint = f" did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ValueError(f"unknown task of lm-eval {name!r};{hint} `lm-eval ls tasks` lists them all.")
    try:
        with no_waiting_without_a_network():
            tasks = manager.load(list(names))["tasks"]
    except (ConnectionError, OSError, ValueError) as error:  # `datasets` raises each of them without a network
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"lm-eval cannot load the data of {', '.join(names)} ({reason}); without a network, give a folder of "
            "questions with --data (docs/evaluation.md; recipes/eval_data.py builds one)."
        ) from error
    for task in tasks.values():
        if task.get_config("num_fewshot") != 0:  # where a task's own prompt has examples, it stays as it is
            task.set_config(key="num_fewshot", value=fewshot)
    return tasks


@functools.cache
def _task_manager() -> TaskManager:
    """Of lm-eval's thousands of files, whose reading takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


@contextlib.contextmanager
def no_waiting_without_a_network() -> Iterator[None]:
    """Within, a hub out of reach is not tried again and again, half a minute a file: only its cache is asked."""
    import datasets.config
    from huggingface_hub import constants

    if hub_answers(constants.ENDPOINT):
        yield
        return
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def hub_answers(endpoint: str) -> bool:
    """Whether the hub's machine takes connections; behind a proxy nobody can tell, so it is taken to."""
    address = urlsplit(endpoint)
    if urllib.request.getproxies().get(address.scheme):
        return True
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), SECONDS_TO_ANSWER).close()
    except OSError:
        return False
    return True
