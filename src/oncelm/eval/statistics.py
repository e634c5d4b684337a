"""Means with 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # of a normal distribution, 2.5 % lie above
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean of `count` values, and the interval that covers the true one in 95 of 100 such experiments."""

    mean: float
    low: float
    high: float
    count: int


def estimate(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> Estimate:
    """Mean and interval: Wilson's where all values are 0 or 1, else of a bootstrap over the values.

    Args:
        values: one a sample, at least one.
        weights: of each value in the mean (such as tokens); None means equal. Given, the bootstrap is used.
        seed: of the bootstrap.
    """
    if not len(values):
        raise ValueError("an estimate needs at least one value.")
    if weights is None and all(value in (0, 1) for value in values):
        return wilson(int(sum(values)), len(values))
    x = np.asarray(values, dtype=np.float64)
    w = np.ones_like(x) if weights is None else np.asarray(weights, dtype=np.float64)
    mean = float((x * w).sum() / w.sum())
    if len(x) == 1:
        return Estimate(mean, math.nan, math.nan, 1)  # one value says nothing about spread
    rows = np.random.default_rng(seed).integers(len(x), size=(RESAMPLES, len(x)))
    means = (x * w)[rows].sum(1) / w[rows].sum(1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Estimate(mean, float(low), float(high), len(x))


def wilson(successes: int, count: int) -> Estimate:
    """Wilson's score interval of a proportion (JASA 22, 1927): sensible at 0 of n and n of n, unlike the normal one."""
    share, z2 = successes / count, Z * Z
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z / (1 + z2 / count) * math.sqrt(share * (1 - share) / count + z2 / (4 * count * count))
    return Estimate(share, max(0.0, centre - half), min(1.0, centre + half), count)
