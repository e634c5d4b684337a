"""The learning rate rises linearly, then falls along its schedule to the minimum."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from oncelm.train.config import TrainConfig
from oncelm.train.schedule import SCHEDULES, lr_factor


def factors(schedule: str, total: float = 100, warmup: int = 10, **shape) -> list[float]:
    options = {"schedule": schedule, "warmup_steps": warmup, "min_lr_ratio": 0.1} | shape
    return [lr_factor(step, total, **options) for step in range(101)]


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


def test_polynomial_has_linear_as_its_first_power() -> None:
    assert factors("polynomial") == factors("linear")
    assert factors("polynomial", power=2.0)[55] == pytest.approx(0.1 + 0.9 * 0.25)


def test_warmup_stable_decay_is_flat_but_for_its_share_at_the_end() -> None:
    values = factors("warmup_stable_decay", decay_fraction=0.2)  # 18 of the 90 steps behind the warm-up
    assert values[10:83] == pytest.approx([1.0] * 73)
    assert values[91] == pytest.approx(0.1 + 0.9 * 0.5)


def test_the_papers_run_stopped_early() -> None:
    """3.2e-4 to 1.28e-5 on a schedule of 5T tokens, batches of 4M, stopped after 400k steps (PAPERS.md)."""
    config = TrainConfig(
        data="unused", out="unused", lr=3.2e-4, min_lr=1.28e-5, schedule="linear", warmup_steps=1000, steps=400_000
    )
    options = {"schedule": "linear", "warmup_steps": 1000, "min_lr_ratio": config.end_lr_ratio}
    total = 1_250_000
    assert 3.2e-4 * lr_factor(999, total, **options) == pytest.approx(3.2e-4)
    assert 3.2e-4 * lr_factor(total, total, **options) == pytest.approx(1.28e-5)
    assert 3.2e-4 * lr_factor(400_000, total, **options) == pytest.approx(2.2e-4, rel=0.01)
