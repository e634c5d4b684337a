"""Counts, gauges and percentiles of what an engine did."""

from __future__ import annotations

import json

import numpy as np
import pytest

from oncelm.engine import metrics
from oncelm.engine.metrics import Distribution, EngineMetrics, Gauges, distribution, latencies
from oncelm.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput


def finished(reason: str = "length", times: tuple[float, ...] = (3.0, 4.0, 6.0), cached: int = 0) -> RequestOutput:
    """A request that arrived at 1 and was scheduled at 1.5, with a prompt of 4 tokens."""
    answer = CompletionOutput(0, token_ids=list(range(len(times))), finish_reason=reason)
    done = RequestMetrics(1.0, 1.5, times[0] if times else None, times[-1] if times else 2.0, list(times))
    return RequestOutput("a", None, [1, 2, 3, 4], [answer], True, done, num_cached_tokens=cached)


def test_latencies_of_a_request() -> None:
    taken = latencies(finished().metrics)
    assert (taken.queue_time, taken.ttft, taken.tpot, taken.e2e) == (0.5, 2.0, 1.5, 5.0)
    assert taken.intervals == [1.0, 2.0]
    drafted = latencies(finished(times=(3.0, 4.0, 4.0, 4.0)).metrics)  # two drafts were accepted
    assert drafted.intervals == [1.0]
    assert drafted.tpot == pytest.approx(1 / 3)
    waiting = latencies(RequestMetrics(1.0))
    assert (waiting.queue_time, waiting.ttft, waiting.tpot, waiting.e2e, waiting.intervals) == (None,) * 4 + ([],)
    assert latencies(finished(times=(3.0,)).metrics).tpot is None


def test_distributions_are_numpys() -> None:
    values = np.random.default_rng(0).random(101)
    found = distribution(values)
    assert found == Distribution(101, values.mean(), *np.percentile(values, (50, 95, 99)), values.max())
    assert distribution([]) is None


def test_a_report_is_plain_values() -> None:
    engine = EngineMetrics()
    assert engine.report(Gauges()).ttft is None
    engine.step(0.25, prefill_tokens=8, rows=2, sampled_tokens=5, drafts_proposed=4, drafts_accepted=3, preemptions=1)
    engine.step(0.75, rows=1, sampled_tokens=1)
    engine.finish(finished(cached=2))
    engine.finish(finished("stop"))
    engine.finish(finished("abort", times=()))
    engine.finish(finished("error", times=(900.0,)))
    report = engine.report(Gauges(num_waiting=3, snapshots={"device": 2}))
    assert report.counts.finished == {"length": 1, "stop": 1, "abort": 1, "error": 1}
    assert (report.counts.prompt_tokens, report.counts.cached_tokens, report.counts.output_tokens) == (16, 2, 7)
    assert (report.counts.steps, report.counts.prefill_tokens, report.counts.preemptions) == (2, 8, 1)
    assert (report.hit_rate, report.tokens_per_row) == (0.125, 2.0)
    assert report.step_time is not None
    assert report.step_time.mean == 0.5
    assert report.ttft == Distribution(2, 2.0, 2.0, 2.0, 2.0, 2.0)  # without those that ended badly
    plain = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert plain["gauges"]["snapshots"] == {"device": 2}
    assert plain["inter_token_latency"]["count"] == 4


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LAST_REQUESTS", "LAST_INTERVALS", "LAST_STEPS"):
        monkeypatch.setattr(metrics, name, 10)
    engine = EngineMetrics()
    for i in range(100):
        engine.step(float(i))
        engine.finish(finished(times=(float(i + 1), float(i + 2), float(i + 4))))
    report = engine.report(Gauges())
    assert report.counts.steps == report.counts.finished["length"] == 100
    for values in (report.step_time, report.ttft, report.inter_token_latency):
        assert values is not None
        assert values.count == 10
    assert report.step_time is not None
    assert report.step_time.p50 == 94.5
