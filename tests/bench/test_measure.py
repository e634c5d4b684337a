from __future__ import annotations

import json
import platform
import sys

import pytest
import torch

from oncelm.bench import PeakMemory, measure
from oncelm.bench.measure import kernel_times
from oncelm.utils.environment import environment_report

CPU = torch.device("cpu")


def test_median_and_spread_after_a_warm_up():
    calls = []
    timing = measure(lambda: calls.append(1), 3, CPU)
    assert len(calls) == 4
    assert len(timing.runs) == 3
    assert min(timing.runs) <= timing.median <= max(timing.runs)


def test_a_long_call_is_made_once():
    calls = []
    timing = measure(lambda: calls.append(1), 3, CPU, long_run=0)
    assert len(calls) == 1
    assert timing.runs == (timing.median,)
    assert timing.spread == 0


def test_a_profile_names_what_took_the_time():
    x = torch.randn(256, 256)
    found = kernel_times(lambda: [x @ x for _ in range(3)] + [x.sort()], CPU)
    calls, milliseconds = found["kernels"]["aten::mm"]
    assert calls == 3
    assert "aten::sort" in found["kernels"]
    assert 0 < milliseconds < found["kernel_milliseconds"]
    costs = [cost for _, cost in found["kernels"].values()]
    assert costs == sorted(costs, reverse=True)


def test_peak_memory_counts_what_the_block_uses_and_not_what_was_there():
    there = torch.ones(1 << 24)  # 64 MiB
    with PeakMemory(CPU) as peak:
        extra = torch.ones(1 << 23)  # 32 MiB
    assert extra.nbytes * 0.9 < peak.bytes < extra.nbytes + there.nbytes / 2


def test_peak_memory_sees_memory_that_was_freed_before_and_is_used_again():
    pieces = [torch.ones(1 << 12) for _ in range(2000)]  # 16 KiB each: the C library keeps them when freed
    pieces.clear()
    with PeakMemory(CPU) as peak:
        pieces = [torch.ones(1 << 12) for _ in range(2000)]
    assert peak.bytes > 0.8 * 2000 * pieces[0].nbytes


def test_the_environment_says_what_and_not_where():
    report = environment_report()
    text = json.dumps(report)
    assert report["torch"] == torch.__version__
    assert report["cores"] >= 1
    assert report["memory_bytes"] > 1 << 28
    assert platform.node() not in text
    assert "/" not in text.replace(report["cpu"], "")
    if not torch.cuda.is_available():
        assert report["gpus"] == []


@pytest.mark.skipif("triton" in sys.modules, reason="something else imported triton")
def test_the_environment_does_not_import_triton():
    environment_report()
    assert "triton" not in sys.modules
