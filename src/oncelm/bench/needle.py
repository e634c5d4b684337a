"""`oncelm bench needle`: how much of a needle grid's time is prefill of the tokens that had to be read."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.table import Table

from oncelm.bench.cases import WARM_UP_TOKENS, random_ids
from oncelm.bench.gate import check
from oncelm.bench.measure import CpuContention, Timing, measure, synchronize
from oncelm.bench.record import Record, circumstances
from oncelm.bench.report import show_seconds
from oncelm.bench.targets import Target
from oncelm.eval import TASKS, LanguageModel, make_task, run
from oncelm.utils.environment import environment_report
from oncelm.utils.errors import check_positive


def run_needle(
    target: Target,
    model: LanguageModel,
    lengths: Sequence[int],
    *,
    dtype: torch.dtype,
    depths: int = 11,
    runs: int = 10,
    strict: bool = False,
    repeats: int = 3,
    on_record: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Time `oncelm eval needle`, from the first question to the closed result file, and a prefill of each length.

    Args:
        target: the model as `oncelm bench prefill` runs it.
        model: the same with its tokenizer.
        lengths: tokens of prompt and answer.
        dtype: of the computation.
        depths, runs, strict: of the grid.
        repeats: of the prefill.
        on_record: called with each record as soon as it is there.

    Returns:
        Records. `prefill_share` is the time that the tokens read would take at the speed of one prefill of that length,
        over the time of the whole grid.

    Raises:
        GateError: the target is wrong; nothing was measured.
    """
    check_positive(repeats=repeats, **{f"length {length}": length for length in lengths})
    device = model.model.device
    errors = check(target, dtype, batch_size=1)
    environment = environment_report()
    records: list[Record] = []
    for length in lengths:
        task = make_task(TASKS["needle"], lengths=(length,), depths=depths, runs=runs, strict=strict)
        with CpuContention() as others:
            alone = _prefill(target, length, repeats)
            with tempfile.TemporaryDirectory() as folder:
                synchronize(device)
                wall, cpu = time.perf_counter(), time.process_time()
                done = run(task, model, Path(folder, "needle.jsonl"), beyond_trained_length=True)
                synchronize(device)
                seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        samples = done.samples.values()
        read = sum(sample["tokens_read"] for sample in samples)
        record = {
            "benchmark": "needle",
            "subject": target.name,
            "length": length,
            "depths": depths,
            "runs_a_depth": runs,
            "strict": strict,
            "samples": len(samples),
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "tokens_read": read,
            "read_seconds": sum(sample["read_seconds"] for sample in samples),
            "answer_seconds": sum(sample["answer_seconds"] for sample in samples),
            "prefill_seconds": alone.median,
            "prefill_runs": alone.runs,
            "prefill_share": read / length * alone.median / seconds,
            "model": model.describe(),
            "shape": target.shape(),
            "settings": dict(target.settings),
            "cores_busy_elsewhere": round(others.cores, 2),
            **circumstances(device, dtype, errors, environment),
        }
        records.append(record)
        on_record(record)
    return records


@torch.no_grad()
def _prefill(target: Target, length: int, repeats: int) -> Timing:
    """As `oncelm bench prefill` times it."""
    ids = random_ids(target, 1, length)
    target.prefill(ids[:, :WARM_UP_TOKENS])
    return measure(lambda: target.prefill(ids), repeats, target.model.device)


def needle_table(records: Sequence[Record]) -> Table:
    """A row a length."""
    first = records[0]
    kind = "strict " if first["strict"] else ""
    title = f"{kind}needle grids, {first['depths']} depths x {first['runs_a_depth']} runs, {first['dtype']}"
    note = "Prefill share: the tokens read, at the speed of one prefill of that length, over the time of the grid."
    drawn = Table(title=title, caption=note, caption_justify="left")
    for head in ("tokens", "grid", "tokens read", "reading", "answers", "one prefill", "prefill share"):
        drawn.add_column(head, justify="right")
    for record in records:
        times = (show_seconds(record[key]) for key in ("read_seconds", "answer_seconds", "prefill_seconds"))
        drawn.add_row(
            f"{record['length']:,}",
            show_seconds(record["seconds"]),
            f"{record['tokens_read']:,}",
            *times,
            f"{record['prefill_share']:.0%}",
        )
    return drawn
