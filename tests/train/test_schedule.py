"""The learning rate rises linearly, then falls along its schedule to the minimum."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from oncelm.train.schedule import SCHEDULES, lr_factor


def factors(schedule: str, total: float = 100, warmup: int = 10) -> list[float]:
    return [lr_factor(step, total, schedule=schedule, warmup_steps=warmup, min_lr_ratio=0.1) for step in range(101)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_then_never_rising_down_to_the_minimum(schedule: str) -> None:
    values = factors(schedule)
    assert values[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert values[10] == 1.0
    assert all(later <= earlier for earlier, later in pairwise(values[9:]))
    assert values[100] == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_half_way_points() -> None:
    assert factors("linear")[55] == pytest.approx(0.55)
    assert factors("cosine")[55] == pytest.approx(0.55)


def test_unknown_and_overrun_totals_are_fine() -> None:
    assert factors("cosine", total=math.inf)[100] == 1.0
    assert factors("linear", total=5)[100] == pytest.approx(0.1)  # a total estimated below the warm-up
