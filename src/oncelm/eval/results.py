"""The file of a run: one JSON line for what was run, then one a sample, each with a checksum.

    {"kind": "run", "configuration": {"task": ..., "options": ..., "seed": ..., "model": ...}, "environment": ..., ...}
    {"kind": "sample", "index": 0, "prompt_hash": ..., "target": ..., "output": ..., "scores": ..., ...}
    {"kind": "end", "samples": 110}

A line is safe from a kill when `append` returns. A run that was killed goes on from its file: a last line that was cut
short is removed, any other damage is an error that names the line.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from oncelm.utils.settings import parse_json

FORMAT = 1
HEAD = b'{"kind": "run", '  # how every result file begins
SYNC_SECONDS = 1.0  # between two waits for the disk, at least


@dataclass
class Run:
    """A result file's content.

    Attributes:
        configuration: what the results depend on; a file belongs to one.
        header: the whole first line: also environment, time, versions.
        samples: by index, in the order they were made.
        complete: whether the run came to its end.
        name: what tells it apart from other runs of its model, for a report.
    """

    configuration: dict[str, Any]
    header: dict[str, Any]
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)
    complete: bool = False
    name: str = ""

    @property
    def label(self) -> str:
        """The model's name, with what tells the run apart."""
        return self.configuration["model"]["name"] + (f" ({self.name})" if self.name else "")


class Damaged(ValueError):
    """A line that nobody wrote so."""


def read_run(path: str | os.PathLike[str]) -> Run:
    """The content of a result file, a last line that was cut short left out.

    Raises:
        ValueError: it is no result file, or damaged; the message names the line.
    """
    run, _ = _parse(Path(path))
    if not run.configuration:
        raise ValueError(f"{path} is empty: no run has been started in it.")
    return run


@contextmanager
def open_run(path: str | os.PathLike[str], header: dict[str, Any]) -> Iterator[ResultFile]:
    """A result file to append to: a new one, or one of the same configuration.

    Raises:
        ValueError: the file is of another configuration, damaged, or being written by another process.
    """
    header = json.loads(json.dumps(header))  # as the file will have it: tuples are lists
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f".{target.name}.lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"{target} is being written by another process.") from None
    with lock, target.open("a+b") as file:
        results = ResultFile(file)
        run, whole = _parse(target)
        if run.samples or run.complete:
            _check_same(target, run.configuration, header["configuration"])
            file.truncate(whole)
            results.run = run
        else:  # new, or left by a run that failed before its first sample: there is nothing to lose
            file.truncate(0)
            results.run = Run(header["configuration"], header)
        if not results.run.header.get("kind"):  # new, or nothing but a cut first line
            results.append({"kind": "run", "format": FORMAT, **header})
            results.run.header = {"kind": "run", "format": FORMAT, **header}
        try:
            yield results
        finally:
            results.sync()


class ResultFile:
    """An open, locked result file and what it holds."""

    run: Run

    def __init__(self, file: Any) -> None:
        self._file = file
        self._synced = -SYNC_SECONDS

    def append(self, *records: dict[str, Any]) -> None:
        """Write a line each: safe from a kill when this returns, from a power cut within SYNC_SECONDS."""
        texts = [json.dumps(record, allow_nan=False) for record in records]
        self._file.write("".join(f'{text[:-1]}, "check": "{_check(text)}"}}\n' for text in texts).encode())
        self._file.flush()
        if time.monotonic() - self._synced >= SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait until the disk has all lines. That may take as long as a short sample."""
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def add(self, *samples: dict[str, Any]) -> None:
        """Write a line each and keep the samples."""
        self.append(*({"kind": "sample", **sample} for sample in samples))
        self.run.samples.update((sample["index"], sample) for sample in samples)


def _check(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _parse(path: Path) -> tuple[Run, int]:
    """The content, and how many bytes of the file are whole lines."""
    raw = path.read_bytes()
    lines = raw.splitlines(keepends=True)
    run: Run | None = None
    whole = 0
    for number, line in enumerate(lines, start=1):
        try:
            record = _record(line)
            run = _take(run, record)
        except Damaged as error:
            cut_header = number == 1 and (HEAD.startswith(line) or (line.startswith(HEAD) and not line.endswith(b"\n")))
            if number == len(lines) and (run is not None or cut_header):
                break  # the process was killed while it wrote this line
            raise ValueError(f"line {number} of {path} is damaged: {error}. Restore the file or delete it.") from None
        whole += len(line)
    return run or Run({}, {}), whole


def _record(line: bytes) -> dict[str, Any]:
    if not line.endswith(b"\n"):
        raise Damaged("it has no end")
    try:
        record = parse_json(line)
    except ValueError as error:
        raise Damaged(f"it is no JSON ({error})") from None
    if not isinstance(record, dict) or "kind" not in record or "check" not in record:
        raise Damaged("it is no line of a result file")
    check = record.pop("check")
    if check != _check(json.dumps(record)):
        raise Damaged("its checksum does not fit")
    return record


def _take(run: Run | None, record: dict[str, Any]) -> Run:
    kind = record["kind"]
    if run is None:
        if kind != "run":
            raise Damaged("the first line must say what was run")
        if record["format"] != FORMAT:
            raise ValueError(f"a result file of format {record['format']}; this version reads format {FORMAT}.")
        return Run(record["configuration"], record)
    if kind == "sample":
        sample = {key: value for key, value in record.items() if key != "kind"}
        if sample["index"] in run.samples:
            raise Damaged(f"sample {sample['index']} is there twice")
        run.samples[sample["index"]] = sample
    elif kind == "end":
        run.complete = True
    else:
        raise Damaged(f"unknown kind {kind!r}")
    return run


def _check_same(path: Path, found: dict[str, Any], asked: dict[str, Any]) -> None:
    """ValueError that names the first difference between two configurations."""
    if not found or found == asked:
        return
    name, here, there = next(_differences(found, asked, ""))
    raise ValueError(
        f"{path} belongs to another run: its {name} is {here!r}, this one's {there!r}. Name another file with --out."
    )


def _differences(a: Any, b: Any, name: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in dict.fromkeys((*a, *b)):
            yield from _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b:
        yield name, a, b
