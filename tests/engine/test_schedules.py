"""Whatever happens to an engine, each answer is that of `model.generate` on its prompt alone (schedules.py).

ONCELM_SCHEDULES=10000 make test-slow runs so many schedules; else it is 2,000.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest

from tests.engine.answers import NAMES, tiny_model
from tests.engine.schedules import draw_schedule, run_schedule

MANY = int(os.environ.get("ONCELM_SCHEDULES", "2000"))


def run_all(seeds: Iterable[int], num_prompts: int, names: tuple[str, ...] = NAMES) -> Counter[str]:
    """Counts of what happened."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        record = run_schedule(draw_schedule(seed, names, num_prompts))
        counts.update(record.counts | {"compared": record.compared, "doubtful": record.doubtful})
    assert counts["doubtful"] <= 4 + 0.02 * counts["compared"], "rounding decides too often: few answers are compared"
    return counts


@pytest.mark.parametrize("name", NAMES)
def test_some_schedules(name) -> None:
    run_all(range(5), 4, (name,))


def test_the_same_schedule_gives_the_same_bits() -> None:
    """But for what comes from a disk, whose thread has its own pace."""
    for seed in range(3):
        schedule = replace(draw_schedule(seed, ("hybrid",), 4), on_disk=False)
        assert run_schedule(schedule).digests == run_schedule(schedule).digests


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_schedules(name) -> None:
    each = -(-MANY // len(NAMES))
    counts = run_all(range(1000, 1000 + each), 30, (name,))
    # what is to be tested does happen; a model without a cross-decoder keeps nothing that pages could run out for
    of_pages = ("preemptions",) * bool(tiny_model(name).config.num_cross_decoder_layers)
    for what in ("cached_tokens", "drafts_accepted", *of_pages):
        assert counts[what] >= each // 20, what
