"""Options of tasks: each has a range, and none is passed over."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest

from oncelm.eval import TASKS, Task, make_task, option


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("wrong", [-1, 2**40, 1.5, "x", [0], True, float("nan"), None], ids=str)
def test_every_option_of_every_task_is_checked(name, wrong) -> None:
    constraints = TASKS[name].constraints()
    assert list(constraints) == [key for key, *_ in TASKS[name].option_fields()]
    for key, constraint in constraints.items():
        try:
            constraint(key, wrong)
        except ValueError as error:
            with pytest.raises(ValueError, match=re.escape(str(error))):
                make_task(TASKS[name], **{key: wrong})


def test_a_type_that_no_option_has_is_an_error() -> None:
    @dataclass(frozen=True)
    class Odd(Task):
        names: list[str] = option((), "names")  # noqa: RUF009

    with pytest.raises(TypeError, match=r"Odd\.names: an option is an int"):
        Odd.constraints()
