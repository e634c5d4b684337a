"""The search of benchmarks/gpu_longest_sequence.py, among training steps that are made up."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def search(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import gpu_longest_sequence

    yield gpu_longest_sequence.search
    del sys.modules["gpu_longest_sequence"]


def steps(end: int):
    """Of sequences of which `end` tokens fit, 1,000 bytes a token, quadratic time."""

    def attempt(length: int):
        if length > end:
            return {"length": length, "error": "out of memory"}
        return {"length": length, "seconds": 1e-9 * length**2, "peak_bytes": 1000 * length + 10}

    return attempt


@pytest.mark.parametrize("end", [3_000, 16_384, 100_000, 213_000])
def test_the_longest_that_fits_is_found_to_a_32nd(search, end: int) -> None:
    lines = list(search(steps(end), 16384, longest_step=1e9))
    longest = max(line["length"] for line in lines if "error" not in line)
    too_long = min(line["length"] for line in lines if "error" in line)
    assert longest <= end < too_long
    assert too_long - longest <= too_long / 32
    assert len(lines) < 12


def test_a_search_that_takes_too_long_tells_the_slope(search) -> None:
    *lines, last = search(steps(10**7), 16384, longest_step=100)
    assert [line["length"] for line in lines] == [16384, 32768, 65536, 131072, 262144]
    assert last == {"longest": 262144, "bytes_per_token": 1000}


def test_a_search_ends_where_nothing_fits(search) -> None:
    assert len(list(search(steps(0), 16384, longest_step=100))) == 5
