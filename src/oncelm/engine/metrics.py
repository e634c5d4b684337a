"""What the engine has done and how long it took: counts since its start, gauges of now, latencies of late."""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from oncelm.engine.outputs import RequestMetrics, RequestOutput

LAST_REQUESTS = 8192  # whose latencies are kept
LAST_INTERVALS = 65536  # between tokens
LAST_STEPS = 8192
ANSWERED = ("stop", "length")  # reasons to end that say nothing went wrong


@dataclass(frozen=True)
class Distribution:
    """Of `count` values; percentiles between two of them are interpolated."""

    count: int
    mean: float
    p50: float
    p95: float
    p99: float
    max: float


def distribution(values: Iterable[float]) -> Distribution | None:
    """The distribution of some values; None of none.

    >>> distribution([1.0, 2.0, 3.0]).p50
    2.0
    """
    array = np.fromiter(values, np.float64)
    if not len(array):
        return None
    p50, p95, p99 = np.percentile(array, (50, 95, 99))
    return Distribution(len(array), float(array.mean()), float(p50), float(p95), float(p99), float(array.max()))


@dataclass(frozen=True)
class Latencies:
    """How long a finished request took, in seconds; None: it never came so far.

    Attributes:
        queue_time: from its arrival until its prompt began to be read.
        ttft: time to first token, from its arrival.
        tpot: time per output token: from the first token to the last, by the tokens after the first.
        e2e: end to end, from its arrival until it was finished.
        intervals: inter-token latencies, the times between the moments at which tokens came. Tokens of one step (drafts
            that were accepted) come at one moment.
    """

    queue_time: float | None
    ttft: float | None
    tpot: float | None
    e2e: float | None
    intervals: list[float]


def latencies(times: RequestMetrics, num_tokens: int | None = None) -> Latencies:
    """Of one request, from when things happened to it.

    Args:
        num_tokens: of its answer, where some of `token_times` stand for several; None: as many as there are times.
    """
    arrival, tokens = times.arrival_time, times.token_times
    count = len(tokens) if num_tokens is None else num_tokens
    moments = sorted(set(tokens))
    return Latencies(
        queue_time=_since(arrival, times.first_scheduled_time),
        ttft=_since(arrival, times.first_token_time),
        tpot=(tokens[-1] - tokens[0]) / (count - 1) if len(tokens) > 1 else None,
        e2e=_since(arrival, times.finished_time),
        intervals=[later - sooner for sooner, later in itertools.pairwise(moments)],
    )


def _since(start: float, end: float | None) -> float | None:
    return None if end is None else end - start


@dataclass(frozen=True)
class Gauges:
    """How full the engine is now.

    Attributes:
        num_waiting, num_running: requests.
        pages_used, pages_total, slots_used, slots_total: of the pool; those that snapshots hold are used.
        snapshots, snapshot_bytes: by tier: "device", "cpu", "disk".
    """

    num_waiting: int = 0
    num_running: int = 0
    pages_used: int = 0
    pages_total: int = 0
    slots_used: int = 0
    slots_total: int = 0
    snapshots: dict[str, int] = field(default_factory=dict)
    snapshot_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Counts:
    """Of what was done since the engine's start.

    Attributes:
        finished: answers that ended, by reason ("stop", "length", "abort", "error").
        prompt_tokens, cached_tokens, output_tokens: of finished requests. Cached are those of the prompt that the
            prefix cache had.
        preemptions: requests that lost their memory to others and were read again.
        steps: of the engine.
        prefill_tokens: read, those of preempted requests as often as they were read.
        rows: places in decode passes; a row gives one token, and more where drafts are accepted.
        sampled_tokens: that rows gave.
        drafts_proposed, drafts_accepted: tokens.
    """

    finished: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    prefill_tokens: int = 0
    rows: int = 0
    sampled_tokens: int = 0
    drafts_proposed: int = 0
    drafts_accepted: int = 0


@dataclass(slots=True)
class PrefixCounts:
    """Of what happened to snapshots since the engine's start.

    Attributes:
        lookups: of what is known of a request's tokens; one that waits is looked up again.
        hits, tokens_hit: snapshots that requests went on from, and their tokens.
        added: snapshots.
        evicted_device, evicted_cpu, evicted_disk: by where they had to make room; they may be elsewhere still.
        damaged: files that were deleted for it.
        not_written: snapshots for which there was no room on the disk, or that it refused.
    """

    lookups: int = 0
    hits: int = 0
    tokens_hit: int = 0
    added: int = 0
    evicted_device: int = 0
    evicted_cpu: int = 0
    evicted_disk: int = 0
    damaged: int = 0
    not_written: int = 0


@dataclass(frozen=True)
class MetricsReport:
    """What `LLM.metrics()` returns. Latencies are of the last requests and steps, in seconds; None: there was none.

    Attributes:
        prefix_cache: what happened to snapshots; None: there are none.
        hit_rate: share of prompt tokens that the prefix cache had.
        tokens_per_row: what a request gets from a decode pass; above 1 with speculative decoding.
        step_time: of a step of the engine.
        queue_time, ttft, tpot, inter_token_latency, e2e: see `Latencies`.
    """

    gauges: Gauges
    counts: Counts
    prefix_cache: PrefixCounts | None
    hit_rate: float
    tokens_per_row: float
    step_time: Distribution | None
    queue_time: Distribution | None
    ttft: Distribution | None
    tpot: Distribution | None
    inter_token_latency: Distribution | None
    e2e: Distribution | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON takes them."""
        return asdict(self)


class EngineMetrics:
    """What the engine tells as it goes. A token costs nothing here: its time is in its request's `RequestMetrics`."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._steps: deque[float] = deque(maxlen=LAST_STEPS)
        self._latencies: dict[str, deque[float]] = {
            name: deque(maxlen=LAST_REQUESTS) for name in ("queue_time", "ttft", "tpot", "e2e")
        }
        self._intervals: deque[float] = deque(maxlen=LAST_INTERVALS)

    def step(
        self,
        seconds: float,
        *,
        prefill_tokens: int = 0,
        rows: int = 0,
        sampled_tokens: int = 0,
        drafts_proposed: int = 0,
        drafts_accepted: int = 0,
        preemptions: int = 0,
    ) -> None:
        """Count a step of the engine."""
        self._steps.append(seconds)
        counts = self._counts
        counts["steps"] += 1
        counts["prefill_tokens"] += prefill_tokens
        counts["rows"] += rows
        counts["sampled_tokens"] += sampled_tokens
        counts["drafts_proposed"] += drafts_proposed
        counts["drafts_accepted"] += drafts_accepted
        counts["preemptions"] += preemptions

    def finish(self, output: RequestOutput) -> None:
        """Count a request that is finished; the latencies of one that was aborted or failed are left out."""
        self._finished.update(answer.finish_reason for answer in output.outputs if answer.finish_reason)
        self._counts["prompt_tokens"] += len(output.prompt_token_ids)
        self._counts["cached_tokens"] += output.num_cached_tokens
        self._counts["output_tokens"] += sum(len(answer.token_ids) for answer in output.outputs)
        if not all(answer.finish_reason in ANSWERED for answer in output.outputs):
            return
        taken = latencies(output.metrics)
        for name, values in self._latencies.items():
            if (value := getattr(taken, name)) is not None:
                values.append(value)
        self._intervals.extend(taken.intervals)

    def report(self, gauges: Gauges, prefix_cache: PrefixCounts | None = None) -> MetricsReport:
        """What was counted and measured, beside how full the engine is now."""
        counts = Counts(finished=dict(self._finished), **self._counts)
        return MetricsReport(
            gauges=gauges,
            counts=counts,
            prefix_cache=None if prefix_cache is None else replace(prefix_cache),
            hit_rate=counts.cached_tokens / max(1, counts.prompt_tokens),
            tokens_per_row=counts.sampled_tokens / max(1, counts.rows),
            step_time=distribution(self._steps),
            inter_token_latency=distribution(self._intervals),
            **{name: distribution(values) for name, values in self._latencies.items()},
        )
