"""A run of a task on a model, into a file that a killed run goes on from."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import torch
from tqdm import tqdm

from oncelm.eval.examples import Example, Generate, Output
from oncelm.eval.model import LanguageModel, Reader
from oncelm.eval.prefix import PrefixReader
from oncelm.eval.results import Run, open_run
from oncelm.eval.task import Task
from oncelm.utils.constraints import Whole
from oncelm.utils.environment import environment_report

LOOK_AHEAD = 32  # examples made before their turn, to see which beginnings they share


def run(
    task: Task,
    model: LanguageModel,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    limit: int | None = None,
    beyond_trained_length: bool = False,
) -> Run:
    """Run a task, one line of `out` a sample; samples that are there already are not asked again.

    Args:
        task: with its options.
        model: to ask.
        out: the result file, new or of the same configuration.
        seed: of everything random in the task.
        limit: samples at most; a later run without it goes on.
        beyond_trained_length: also ask for longer texts than the model was made for.

    Raises:
        ValueError: the file is damaged or of another configuration; a text is too long; the task's own.
    """
    Whole(0)("seed", seed)
    Whole(1, optional=True)("limit", limit)
    if not beyond_trained_length:
        _check_length(task.longest(), model)
    configuration = {"task": task.name, "options": task.options(), "seed": seed, "model": model.describe()}
    header = {
        "configuration": configuration,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": str(model.model.device),
        "environment": environment_report(),
    }
    with open_run(out, header) as file:
        done = file.run.samples
        if file.run.complete:
            return file.run
        total = task.count()
        if limit is not None:
            total = limit if total is None else min(limit, total)
        own = task.answers(model, seed, done, limit, None if beyond_trained_length else model.longest)
        if own is not None:
            total, batches = own
        with tqdm(total=total, initial=len(done), desc=task.name, unit="sample", dynamic_ncols=True) as bar:
            if own is None:
                left = _left(task, model, seed, done, limit, out)
                batches = _one_by_one(task, model, left, beyond_trained_length, bar)
            for lines in batches:
                file.add(*lines)
                bar.update(len(lines))
        if limit is None:
            file.append({"kind": "end", "samples": len(done)})
            file.run.complete = True
        return file.run


def _left(
    task: Task, model: LanguageModel, seed: int, done: dict[int, Any], limit: int | None, out: Any
) -> Iterator[tuple[int, Example]]:
    """The examples without a line in the file, with their numbers."""
    for index, example in enumerate(task.examples(model.codec, seed)):
        if limit is not None and index >= limit:
            return
        if index not in done:
            yield index, example
        elif done[index].get("prompt_hash") != example.hash():
            raise ValueError(
                f"{out} belongs to another run: its sample {index} has another prompt, so the texts that it was made "
                "of have changed. Name another file with --out."
            )


def _one_by_one(
    task: Task, model: LanguageModel, left: Iterator[tuple[int, Example]], beyond_trained_length: bool, bar: tqdm
) -> Iterator[list[dict[str, Any]]]:
    """The lines of these examples, each by itself."""
    reader = PrefixReader(model)
    for index, example, upcoming in _with_upcoming(left):
        if not beyond_trained_length:
            _check_length(len(example.prompt) + example.room, model)
        yield [{"index": index, **_ask(task, model, reader, example, upcoming, bar)}]


def _with_upcoming(items: Iterator[tuple[int, Example]]) -> Iterator[tuple[int, Example, list[Example]]]:
    """Each item with the ones that follow it."""
    ahead: deque[tuple[int, Example]] = deque()
    for item in items:
        ahead.append(item)
        if len(ahead) > LOOK_AHEAD:
            index, example = ahead.popleft()
            yield index, example, [later for _, later in ahead]
    while ahead:
        index, example = ahead.popleft()
        yield index, example, [later for _, later in ahead]


def _ask(
    task: Task, model: LanguageModel, prefix: PrefixReader, example: Example, upcoming: list[Example], bar: tqdm
) -> dict[str, Any]:
    """One sample's line: read, answer, judge."""
    total = len(example.prompt) + (0 if isinstance(example, Generate) else example.room)

    def progress(done: int) -> None:
        if total > 10_000:
            bar.set_postfix_str(f"read {done:,} of {total:,} tokens")

    start = time.perf_counter()
    try:
        reader, tokens_read = prefix.read(example, upcoming, progress)
        if model.model.device.type == "cuda":  # so that times are what they say
            torch.cuda.synchronize(model.model.device)
        read = time.perf_counter()
        if isinstance(example, Generate):
            output: Output = _write(task, model, reader, example)
        else:
            output = reader.score(example.continuation, progress)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of memory at a text of {total:,} tokens; the {bar.n:,} samples before it are kept, and the same "
            "command goes on from there."
        ) from error
    answered = time.perf_counter()
    return {
        "prompt_hash": example.hash(),
        "prompt_tokens": len(example.prompt),
        "tags": dict(example.tags),
        "target": example.target,
        "output": output if isinstance(output, str) else None,
        "scores": task.score(example, output),
        "tokens_read": tokens_read,
        "read_seconds": round(read - start, 6),
        "answer_seconds": round(answered - read, 6),
    }


def _write(task: Task, model: LanguageModel, reader: Reader, example: Generate) -> str:
    """The greedy continuation as text, up to `stop` or until the task has seen enough."""

    def is_complete(ids: list[int]) -> bool:
        # a stop may be a special token, which is no part of the answer
        stopped = bool(example.stop) and example.stop in model.codec.decode(ids, skip_special_tokens=False)
        return stopped or task.decided(example, model.codec.decode(ids))

    text = model.codec.decode(reader.generate(example.max_new_tokens, is_complete))
    return text.partition(example.stop)[0] if example.stop else text


def _check_length(tokens: int | None, model: LanguageModel) -> None:
    if tokens is not None and model.longest is not None and tokens > model.longest:
        raise ValueError(
            f"a text of {tokens:,} tokens is longer than {model.name} was made for ({model.longest:,}: its "
            "max_position_embeddings); ask for a shorter one, or allow it with --beyond-trained-length."
        )
