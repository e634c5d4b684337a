"""Units of text (units.py) to shards of tokens, in parallel; a shard exists only when it is complete."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from oncelm.data.encoding import Encoder
from oncelm.data.progress import progress_bar
from oncelm.data.reading import Document, read
from oncelm.data.shards import ShardInfo, write_info
from oncelm.data.units import Unit
from oncelm.data.writer import ShardWriter
from oncelm.utils.files import atomic_file

KEPT_EXAMPLES = 100  # malformed lines that a shard remembers; all are counted


@dataclass(frozen=True)
class Problem:
    """A line that is no document, and why; line 0 is the file itself."""

    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}" if self.line else f"{self.path}: {self.reason}"


class MalformedLine(ValueError):
    """Raised with `strict`: the first line that is no document."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def make_shards(units: Sequence[Unit], shards: Path, encoder: Encoder, bos: bool, strict: bool, workers: int) -> None:
    """Make these shards. The first failure, in their order, is raised; the others stop."""
    stop = threading.Event()
    left, counting = len(units), threading.Lock()

    def ahead() -> int:  # all threads for the last shard, about two batches of each of many
        return 1 + workers // min(workers, left)

    with (
        progress_bar("tokenize", sum(unit.num_bytes for unit in units)) as progress,
        _one_thread_a_call(),
        ThreadPoolExecutor(workers) as encoders,  # of their own: a compressed file has one reader, and wants them all
        ThreadPoolExecutor(workers) as readers,
    ):
        open_writer = partial(ShardWriter, encoder=encoder, bos=bos, pool=encoders, ahead=ahead)

        def make(unit: Unit) -> None:
            nonlocal left
            if not stop.is_set():
                _make_shard(unit, shards, open_writer, strict, progress, stop)
            with counting:
                left -= 1

        tasks = [readers.submit(make, unit) for unit in units]
        try:
            for task in tasks:
                task.result()
        except BaseException:
            stop.set()
            encoders.shutdown(wait=False, cancel_futures=True)  # ends a reader within a document, too
            readers.shutdown(cancel_futures=True)
            raise


def _make_shard(
    unit: Unit,
    shards: Path,
    open_writer: Callable[[BinaryIO, BinaryIO], ShardWriter],
    strict: bool,
    progress: Callable[[int], None],
    stop: threading.Event,
) -> None:
    """Write the three files of one shard; KEY.json, which completes it, last."""
    stem = shards / unit.key
    malformed: list[tuple[int, int, str]] = []
    num_malformed = 0
    with (
        atomic_file(f"{stem}.tokens") as tokens,
        atomic_file(f"{stem}.documents") as documents,
        tokens.open("wb") as token_file,
        documents.open("wb") as document_file,
    ):
        writer = open_writer(token_file, document_file)
        for number, piece in enumerate(unit.pieces):
            for item in read(piece, progress):
                if stop.is_set():
                    raise InterruptedError("stopped")
                problem = writer.add(item) if isinstance(item, Document) else item
                if problem is None:
                    continue
                if strict:
                    raise MalformedLine(Problem(piece.path, problem.line, problem.reason))
                num_malformed += 1
                if len(malformed) < KEPT_EXAMPLES:
                    relative = problem.line - piece.line if problem.line else 0
                    malformed.append((number, relative, problem.reason))
        writer.finish()
    for piece in unit.pieces:
        if os.stat(piece.path).st_mtime_ns != piece.mtime_ns:  # under its key would be another text's shard
            raise ValueError(f"{piece.path} was changed while it was read; run again when it is complete.")
    info = ShardInfo(
        writer.num_tokens,
        writer.num_documents,
        writer.longest,
        writer.largest_id,
        num_malformed,
        malformed,
        writer.checksums,
    )
    write_info(shards, unit.key, info)


@contextmanager
def _one_thread_a_call() -> Iterator[None]:
    """The tokenizer library starts no threads of its own meanwhile: a call of it a core is faster."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
