"""The learning rate of each step: a linear warm-up, then a decay of a named shape."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "linear", "polynomial", "warmup_stable_decay", "constant")


def lr_factor(
    step: int,
    total_steps: float,
    *,
    schedule: str,
    warmup_steps: int,
    min_lr_ratio: float,
    power: float = 1.0,
    decay_fraction: float = 0.2,
) -> float:
    """What the peak learning rate is multiplied by at `step`, counted from 0.

        (step + 1) / warmup_steps                         while step < warmup_steps
        min_lr_ratio + (1 - min_lr_ratio) * shape(p)      after it, p = (step - warmup) / (total - warmup)

    `total_steps` may be an estimate, or infinite: a run bounded by time does not know it exactly.

    Args:
        power: of "polynomial".
        decay_fraction: of "warmup_stable_decay": the share of the steps after the warm-up, at their end, that decay.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
    shape = _shape(schedule, progress, power, decay_fraction)
    return min_lr_ratio + (1.0 - min_lr_ratio) * shape


def _shape(schedule: str, progress: float, power: float, decay_fraction: float) -> float:
    """From progress after the warm-up, 0 to 1, to the share of the way still above the minimum, 1 to 0."""
    match schedule:
        case "constant":
            return 1.0
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * progress))
        case "linear":
            return 1.0 - progress
        case "polynomial":  # linear is its power 1
            return (1.0 - progress) ** power
        case "warmup_stable_decay":  # constant, then linear (arXiv 2404.06395 found its exact shape to matter little)
            return min(1.0, (1.0 - progress) / decay_fraction)
    raise ValueError(f"unknown schedule {schedule!r}; allowed: {', '.join(SCHEDULES)}.")
