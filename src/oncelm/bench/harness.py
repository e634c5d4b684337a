"""`oncelm bench harness`: lm-eval's questions through our adapter, beside lm-eval's own HFLM on the same model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.table import Table
from tqdm import tqdm

from oncelm.bench.gate import TOLERANCES, GateError
from oncelm.bench.measure import LONG_RUN, CpuContention, synchronize
from oncelm.bench.record import Record, circumstances
from oncelm.bench.report import show_seconds
from oncelm.eval import LanguageModel
from oncelm.utils.environment import environment_report
from oncelm.utils.errors import check_positive

HARNESS_TASKS = ("arc_challenge", "hellaswag")
OURS, PEER = "OnceLM", "HFLM"
EXACT = 1e-4  # of a log-likelihood in float32; in 16 bits HFLM takes the softmax in 16 bits too

Answers = list[tuple[float, bool]]


def run_harness(
    model: LanguageModel,
    data: str,
    tasks: Sequence[str] = HARNESS_TASKS,
    *,
    dtype: torch.dtype,
    questions: int = 8,
    fewshot: int = 5,
    batch_size: int = 16,
    repeats: int = 3,
    on_record: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Let both score the same questions, compare their log-likelihoods, then time them in turns.

    Args:
        model: any causal language model and its tokenizer.
        data: the folder of questions that `recipes/eval_data.py harness` writes.
        tasks: folders in it.
        dtype: of the computation; sets how far the two may differ.
        questions: of each task, from the first.
        fewshot: examples before each question.
        batch_size: HFLM's.
        repeats: of each timing; the median counts. A run longer than 20 s is timed once.
        on_record: called with each record as soon as it is there.

    Returns:
        Records, two a task: seconds, CPU seconds (a busy machine disturbs them less), largest difference.

    Raises:
        ValueError: the folder lacks a task or a split.
        GateError: the two disagree; that task is not timed.
    """
    from lm_eval.models.huggingface import HFLM

    from oncelm.eval.harness.adapter import OnceLM
    from oncelm.eval.harness.folder import check_folder, folder_task
    from oncelm.eval.harness.suite import SEED, quiet

    check_positive(questions=questions, batch_size=batch_size, repeats=repeats)
    check_folder(data, tasks, fewshot)
    tokenizer: Any = model.codec.tokenizer
    with quiet():
        peer = HFLM(pretrained=model.model, tokenizer=tokenizer, batch_size=batch_size, max_length=model.longest)
    scorers = {OURS: OnceLM(model), PEER: peer}
    environment = environment_report()
    records: list[Record] = []
    for name in tqdm(tasks, desc="harness", unit="task", dynamic_ncols=True):
        with quiet():
            task = folder_task(data, name, fewshot)
            task.set_fewshot_seed(SEED)
            task.build_all_requests(limit=questions)
        runs: dict[str, list[tuple[float, float]]] = {scorer: [] for scorer in scorers}
        with CpuContention() as others:
            answers, first = {}, {}
            for scorer, lm in scorers.items():
                answers[scorer], first[scorer] = _timed(lm, task.instances, model.model.device)
            errors = compare(name, answers[OURS], answers[PEER], dtype)
            for scorer, seconds in first.items():
                runs[scorer] = [seconds] if seconds[0] > LONG_RUN else []
            for _ in range(repeats):
                for scorer, lm in scorers.items():
                    if first[scorer][0] <= LONG_RUN:
                        runs[scorer].append(_timed(lm, task.instances, model.model.device)[1])
        for scorer, timed in runs.items():
            wall, cpu = zip(*timed, strict=True)
            record = {
                "benchmark": "harness",
                "subject": scorer,
                "task": name,
                "fewshot": fewshot,
                "questions": questions,
                "requests": len(task.instances),
                "tokens": sum(len(tokenizer.encode("".join(request.args))) for request in task.instances),
                "seconds": statistics.median(wall),
                "runs": wall,
                "cpu_seconds": statistics.median(cpu),
                "cpu_runs": cpu,
                "repeats": len(wall),
                "model": model.describe(),
                "settings": {"batch_size": batch_size} if scorer == PEER else {},
                "cores_busy_elsewhere": round(others.cores, 2),
                **circumstances(model.model.device, dtype, errors, environment),
            }
            records.append(record)
            on_record(record)
    return records


def compare(name: str, ours: Answers, theirs: Answers, dtype: torch.dtype) -> dict[str, float]:
    """Largest and relative difference of the log-likelihoods.

    Raises:
        GateError: in float32, one above 1e-4 or another greedy verdict; in 16 bits, a norm of the difference above the
            tolerance of the dtype, relative.
    """
    got, expected = (torch.tensor([value for value, _ in one], dtype=torch.float64) for one in (ours, theirs))
    largest, relative = (got - expected).abs().max().item(), ((got - expected).norm() / expected.norm()).item()
    greedy = sum(a[1] != b[1] for a, b in zip(ours, theirs, strict=True))
    exact = dtype in (torch.float32, torch.float64)
    right = (largest <= EXACT and not greedy) if exact else relative <= TOLERANCES[dtype]
    if not right:
        raise GateError(
            f"{OURS} and {PEER} disagree on {name}: log-likelihoods by up to {largest:.2g} ({relative:.2g} of their "
            f"norm), {greedy} greedy verdicts: nothing is measured."
        )
    return {"largest_difference": largest, "relative_difference": relative, "greedy_differences": float(greedy)}


def _timed(lm: Any, requests: Sequence[Any], device: torch.device) -> tuple[Answers, tuple[float, float]]:
    """The answers, and seconds on the clock and of this process at work."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    answers = lm.loglikelihood(requests, disable_tqdm=True)
    synchronize(device)
    return answers, (time.perf_counter() - wall, time.process_time() - cpu)


def harness_table(records: Sequence[Record]) -> Table:
    """A row a task and scorer, with HFLM's time over ours."""
    first = records[0]
    title = (
        f"{first['fewshot']}-shot, {first['questions']} questions a task, {first['model']['name']}, {first['dtype']}"
    )
    drawn = Table(title=title)
    for head in ("task", "scorer", "requests", "time", "/ ours", "CPU time", "/ ours", "difference"):
        drawn.add_column(head, justify="left" if head in ("task", "scorer") else "right")
    ours = {record["task"]: record for record in records if record["subject"] == OURS}
    for record in records:
        base = ours[record["task"]]
        times = []
        for key in ("seconds", "cpu_seconds"):
            times += [show_seconds(record[key]), "" if record is base else f"{record[key] / base[key]:.2f}x"]
        drawn.add_row(
            record["task"],
            record["subject"],
            str(record["requests"]),
            *times,
            f"{record['gate_errors']['largest_difference']:.1e}",
        )
    return drawn
