"""Deals by weight and permutes: exactly, evenly, and always the same."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.data.sampler import Schedule, permute


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**63), st.integers(0, 5))
def test_every_index_goes_to_a_place_of_its_own(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(i, size, seed, epoch) for i in range(size)) == list(range(size))


def test_a_permutation_of_more_than_memory_holds() -> None:
    size = 10**15 + 7
    places = [permute(i, size, 0) for i in range(1000)]
    assert len(set(places)) == 1000
    assert all(0 <= place < size for place in places)
    assert abs(np.mean(places) / size - 0.5) < 0.05


def test_keys_give_permutations_that_look_drawn_at_random() -> None:
    """Every place equally often, for the first index and for the distance between neighbours."""
    size, keys = 23, 4600
    for of in (lambda key: permute(0, size, key), lambda key: (permute(1, size, key) - permute(0, size, key)) % size):
        counts = Counter(of(key) for key in range(keys))
        cells = size if len(counts) == size else size - 1
        chi_square = sum((counts[i] - keys / cells) ** 2 / (keys / cells) for i in counts)
        assert len(counts) == cells
        assert chi_square < 55  # 22 degrees of freedom: one in ten thousand is above


weights = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(weights, st.integers(0, 1000), st.integers(0, 10**9))
def test_every_window_of_ten_thousand_has_every_share_exactly(shares: list[float], seed: int, first: int) -> None:
    schedule = Schedule(shares, seed)
    drawn = np.array([schedule.locate(k)[0] for k in range(first, first + 14_000)])
    for choice, weight in enumerate(shares):
        before = np.concatenate([[0], np.cumsum(drawn == choice)])
        windows = before[10_000:] - before[:-10_000]
        assert np.abs(windows - 10_000 * weight / sum(shares)).max() < 4  # 0.04 percent of the window


@settings(max_examples=50, deadline=None)
@given(weights, st.integers(0, 1000), st.integers(0, 10**12))
def test_what_a_choice_got_before_is_counted_right(shares: list[float], seed: int, first: int) -> None:
    schedule = Schedule(shares, seed)
    counts: dict[int, int] = {}
    for k in range(first, first + 300):
        choice, number = schedule.locate(k)
        assert number == counts.get(choice, number)
        counts[choice] = number + 1
    zeros = Schedule(shares, seed)
    seen: Counter[int] = Counter()
    for k in range(300):
        choice, number = zeros.locate(k)
        assert number == seen[choice]
        seen[choice] += 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 100))
def test_whole_weights_are_used_up_exactly(counts: list[int], seed: int) -> None:
    drawn = Counter(Schedule(counts, seed).locate(k)[0] for k in range(sum(counts)))
    assert [drawn[choice] for choice in range(len(counts))] == counts


@pytest.mark.parametrize("seed", [0, 1])
def test_another_seed_is_another_order_of_the_same_shares(seed: int) -> None:
    orders = [[Schedule([1, 2, 4], s).locate(k)[0] for k in range(70)] for s in (seed, seed + 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
