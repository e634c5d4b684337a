"""The learning rate of each step: a linear warm-up, then a decay of a named shape."""

from __future__ import annotations

import math
from collections.abc import Callable

# Each maps progress after the warm-up, 0 to 1, to the share of the way still above the minimum, 1 to 0.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1.0 - progress,
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "constant": lambda progress: 1.0,
}


def lr_factor(step: int, total_steps: float, *, schedule: str, warmup_steps: int, min_lr_ratio: float) -> float:
    """What the peak learning rate is multiplied by at `step`, counted from 0.

        (step + 1) / warmup_steps                         while step < warmup_steps
        min_lr_ratio + (1 - min_lr_ratio) * shape(p)      after it, p = (step - warmup) / (total - warmup)

    `total_steps` may be an estimate, or infinite: a run bounded by time does not know it exactly.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1.0, total_steps - warmup_steps)
    return min_lr_ratio + (1.0 - min_lr_ratio) * SCHEDULES[schedule](min(1.0, progress))
