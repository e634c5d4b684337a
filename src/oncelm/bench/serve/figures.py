"""What a replay came to: rates, percentiles, and a table of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from rich.table import Table

from oncelm.bench.record import Record
from oncelm.bench.report import show_seconds
from oncelm.bench.serve.play import Answer
from oncelm.engine.metrics import Latencies, distribution, latencies

# of `Latencies`, by name, and how they are called in tables and plots
TITLES = {
    "queue_time": "queue time",
    "ttft": "time to first token (TTFT)",
    "tpot": "time per output token (TPOT)",
    "inter_token_latency": "inter-token latency (ITL)",
    "e2e": "end to end",
}


def whole(answers: Sequence[Answer]) -> list[Answer]:
    """Those without an error."""
    return [answer for answer in answers if answer.error is None]


def latencies_of(answer: Answer) -> Latencies:
    return latencies(answer.times, answer.num_output_tokens)


def values_of(answers: Sequence[Answer]) -> dict[str, list[float]]:
    """Seconds of all whole answers, by the names in TITLES."""
    taken = [latencies_of(answer) for answer in whole(answers)]
    single = {
        name: [value for one in taken if (value := getattr(one, name)) is not None]
        for name in TITLES
        if name != "inter_token_latency"
    }
    return single | {"inter_token_latency": [value for one in taken for value in one.intervals]}


def figures(answers: Sequence[Answer]) -> Record:
    """The figures of a replay, as plain values.

    Returns:
        requests, failed, errors (how many of each); seconds, from the first arrival to the last token;
        prompt_tokens, output_tokens, cached_tokens (None: not told), hit_rate; requests_per_second,
        output_tokens_per_second, total_tokens_per_second (of prompts too); and by the names in TITLES a distribution
        in seconds, or None.
    """
    good = whole(answers)
    prompt, output = (sum(getattr(answer, f"num_{what}_tokens") for answer in good) for what in ("prompt", "output"))
    ends = [answer.times.finished_time for answer in good if answer.times.finished_time is not None]
    seconds = max(ends) - min(answer.times.arrival_time for answer in answers) if ends else 0.0
    told = [answer.num_cached_tokens for answer in good if answer.num_cached_tokens is not None]
    cached = sum(told) if told else None
    values = values_of(answers)
    errors: dict[str, int] = {}
    for answer in answers:
        if answer.error is not None:
            errors[answer.error] = errors.get(answer.error, 0) + 1
    return {
        "requests": len(answers),
        "failed": len(answers) - len(good),
        "errors": errors,
        "seconds": seconds,
        "prompt_tokens": prompt,
        "output_tokens": output,
        "cached_tokens": cached,
        "hit_rate": None if cached is None else cached / max(1, prompt),
        **{
            f"{name}_per_second": amount / seconds if seconds else 0.0
            for name, amount in (
                ("requests", len(good)),
                ("output_tokens", output),
                ("total_tokens", prompt + output),
            )
        },
        **{name: asdict(found) if (found := distribution(values[name])) else None for name in TITLES},
    }


def serve_table(record: Record) -> Table:
    """Percentiles, and the rates below."""
    drawn = Table(title=f"serve: {record['subject']}, {record['model']}", caption=_caption(record))
    drawn.caption_justify = "left"
    drawn.add_column("")
    for title in ("mean", "p50", "p95", "p99", "max"):
        drawn.add_column(title, justify="right")
    for name, title in TITLES.items():
        if record[name] is not None:
            drawn.add_row(title, *(show_seconds(record[name][key]) for key in ("mean", "p50", "p95", "p99", "max")))
    return drawn


def _caption(record: Record) -> str:
    lines = [
        record["workload"],
        f"{record['requests']:,} requests in {show_seconds(record['seconds'])}: "
        f"{record['requests_per_second']:.3g} requests/s, {record['output_tokens_per_second']:,.4g} output tokens/s, "
        f"{record['total_tokens_per_second']:,.4g} tokens/s with prompts",
        f"{record['prompt_tokens']:,} prompt tokens, {record['output_tokens']:,} output tokens"
        + ("" if record["hit_rate"] is None else f"; of prompts {record['hit_rate']:.1%} were in the prefix cache"),
    ]
    if memory := record.get("memory"):
        lines.append(memory)
    if record["failed"]:
        lines.append(f"{record['failed']:,} failed:")
        lines += [f"  {count:,} x {error}" for error, count in record["errors"].items()]
    return "\n".join(lines)
