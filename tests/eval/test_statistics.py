"""Intervals against known values and against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from oncelm.eval.statistics import estimate, wilson


def test_wilson_against_published_values() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    for successes, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        e = wilson(successes, count)
        assert (round(e.low, 4), round(e.high, 4)) == (low, high)
    assert wilson(29, 29).high == 1.0


def test_shares_use_wilson_and_other_values_a_bootstrap() -> None:
    assert estimate([0, 1, 1, 1]) == wilson(3, 4)
    values = np.random.default_rng(0).normal(3, 2, 400).tolist()
    e = estimate(values)
    half = 1.96 * np.std(values) / math.sqrt(400)
    assert e.mean == pytest.approx(np.mean(values))
    assert e.high - e.low == pytest.approx(2 * half, rel=0.1)
    assert e == estimate(values)


def test_weights() -> None:
    assert estimate([1.0, 4.0], [3, 1]).mean == pytest.approx(1.75)


def test_one_value_has_no_interval_and_none_is_an_error() -> None:
    assert math.isnan(estimate([0.3]).low)
    with pytest.raises(ValueError, match="at least one value"):
        estimate([])
