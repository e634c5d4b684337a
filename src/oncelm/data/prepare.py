"""A corpus to token shards on disk: in parallel, restartable at any moment, only what changed made anew.

The result is a folder of tokens (`oncelm.data.shards` says what lies in it), with one file more:

    FOLDER/scan.json  size, time and checksums of the text's files, so that a restart need not read them

A shard's key is a checksum of the text's bytes, the tokenizer and the format. What is on disk under a key is therefore
what would be computed, whenever and by whichever run it was made, and is never computed twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from oncelm.data.bpe import corpus_tokenizer
from oncelm.data.checksums import DamagedFile, damaged_files, write_listing, write_sealed
from oncelm.data.encoding import Encoder
from oncelm.data.layout import Corpus, Source, find_corpus
from oncelm.data.place import default_folder, hidden_folder, make_place, turn
from oncelm.data.progress import progress_bar
from oncelm.data.reading import Document, Piece, is_text, read, scan
from oncelm.data.shards import (
    CHECKED_AT_START,
    FILE_NAME,
    FORMAT,
    MANIFEST,
    SCAN,
    ShardInfo,
    check_shard,
    find_info,
    manifest_entry,
    read_info,
    read_scan,
    token_dtype,
    write_info,
)
from oncelm.data.tokens import read_manifest, shard_entries
from oncelm.data.writer import ShardWriter
from oncelm.utils.environment import usable_cores
from oncelm.utils.errors import check_positive
from oncelm.utils.files import atomic_file, atomic_folder, clean_up

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
T = TypeVar("T")

KEPT_EXAMPLES = 100  # malformed lines that a shard remembers; all are counted
# Text files are gathered into shards: a shard a file would be too many. A shard ends where the checksum of a
# file's name says, about every so many files, so that a file more or less changes one shard, not all behind it.
FILES_IN_SHARD = 64
BYTES_IN_SHARD = 64 << 20


@dataclass(frozen=True)
class Unit:
    """What becomes one shard."""

    pieces: tuple[Piece, ...]
    key: str

    @property
    def num_bytes(self) -> int:
        return sum(piece.stop - piece.start for piece in self.pieces)


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


def prepare(
    corpus: Corpus | str | Path,
    tokenizer: PreTrainedTokenizerBase | str,
    folder: str | Path | None = None,
    *,
    bos: bool = False,
    strict: bool = False,
    workers: int | None = None,
    check: bool = False,
) -> Path:
    """Tokenize what is not yet, and return the folder of the result (see `oncelm.data.tokens.open_tokens`).

    Killed at any moment, it goes on from the last complete shard; two at a time on one folder take turns.
    Progress bars appear when it takes longer than two seconds.

    Args:
        corpus: text: a file, a folder, a corpus with json/train.json (`find_corpus`).
        tokenizer: any of Hugging Face's, with an eos token, or its name; "bpe:4096" is made from the text, and kept
            beside its tokens.
        folder: of the result; None: `.oncelm/<tokenizer>` beside the text.
        bos: start every document with the tokenizer's bos token.
        strict: a malformed line is an error (the first in the corpus's order), instead of counted and left out.
        workers: threads that encode, each with up to about 30 MB in hand; None: one a core.
        check: look for damage in all shards that are there, which are then made again; else only as much as
            `open_tokens` does, which is all of a small folder.

    Raises:
        ValueError: a source without any document, a tokenizer without eos, a malformed line with `strict`; a `folder`
            that is the text's.
        OSError: a file cannot be written. Complete shards are kept.
    """
    corpus = corpus if isinstance(corpus, Corpus) else find_corpus(corpus)
    if isinstance(tokenizer, str):
        tokenizer = corpus_tokenizer(tokenizer, corpus, hidden_folder(corpus) if folder is None else Path(folder))
    encoder = Encoder(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer has no eos token to end every document with; set tokenizer.eos_token.")
    if bos and tokenizer.bos_token_id is None:
        raise ValueError("bos=True, but the tokenizer has no bos token; leave bos out or set tokenizer.bos_token.")
    workers = usable_cores() if workers is None else workers
    check_positive(workers=workers)
    fingerprint = encoder.fingerprint()
    out = default_folder(corpus, fingerprint) if folder is None else Path(folder)
    if out.resolve() == corpus.path.resolve():
        raise ValueError(f"folder {str(out)!r} is the text's own; name another for its tokens.")
    shards = out / "shards"
    make_place(out)
    make_place(shards)
    with turn(out):
        clean_up(out)  # nobody else is here
        clean_up(shards)
        pieces = _scan_all(corpus, out, workers)
        units = {source: _units(source, pieces, f"{FORMAT} {fingerprint} {bos}") for source in corpus.sources}
        try:
            every = [unit for group in units.values() for unit in group]
            missing = _find_missing(every, shards, token_dtype(encoder.vocab_size), check)
            _make_shards(missing, shards, encoder, bos, strict, workers)
        except MalformedLine as error:  # the first of the shards made now: in one made before may be an earlier one
            for source, group in units.items():
                made = [(unit, info) for unit in group if (info := find_info(shards, unit.key)) is not None]
                if problems := _problems(source, made, pieces, error.problem):
                    raise MalformedLine(problems[0]) from None
            raise
        _write_manifest(corpus, units, pieces, out, encoder, fingerprint, bos, strict)
    return out


def prune(folder: Path) -> int:
    """Delete the shards that FOLDER/tokens.json does not name (of text or a tokenizer since replaced); bytes freed."""
    with turn(folder):
        used = shard_entries(read_manifest(folder)[0])
        named = ((FILE_NAME.fullmatch(file.name), file) for file in (folder / "shards").iterdir())
        stale = [file for name, file in named if name and name[1] not in used]
        freed = sum(file.stat().st_size for file in stale)
        for file in stale:
            file.unlink()
    return freed


# -- what there is to do ----------------------------------------------------------------------------------------------


def _scan_all(corpus: Corpus, out: Path, workers: int) -> dict[Path, list[Piece]]:
    """The pieces of every file; files whose size and time are as they were are not read again."""
    before, sealed = _unless_damaged(read_scan, out) or ({}, False)
    files = dict.fromkeys(file for source in corpus.sources for file in source.files)
    found: dict[Path, list[Piece]] = {}
    records = {}
    with (
        progress_bar("scan", sum(file.stat().st_size for file in files)) as progress,
        ThreadPoolExecutor(workers) as pool,
    ):

        def look(file: Path) -> tuple[list[int], list[Piece]]:
            status = file.stat()
            state = [status.st_size, status.st_mtime_ns, status.st_ino]
            known = before.get(str(file))
            pieces = [Piece(*fields) for fields in known["pieces"]] if known and known["state"] == state else scan(file)
            progress(status.st_size)
            return state, pieces

        for file, (state, pieces) in zip(files, pool.map(look, files), strict=True):
            found[file] = pieces
            records[str(file)] = {"state": state, "pieces": [dataclasses.astuple(piece) for piece in pieces]}
    if records != before or not sealed:
        write_sealed(out / SCAN, records)
    return found


def _units(source: Source, pieces: dict[Path, list[Piece]], settings: str) -> list[Unit]:
    """The pieces of a source as shards to be, in order."""
    groups: list[list[Piece]] = []
    open_group = False
    for file in source.files:
        gather = is_text(file.name)
        for piece in pieces[file]:
            if gather and open_group:
                groups[-1].append(piece)
            else:
                groups.append([piece])
            name_digest = hashlib.sha256(os.fsencode(file.name)).digest()
            full = sum(p.stop - p.start for p in groups[-1]) >= BYTES_IN_SHARD
            open_group = gather and not full and name_digest[0] % FILES_IN_SHARD != 0
    return [Unit(tuple(group), _key(group, settings)) for group in groups]


def _find_missing(units: Sequence[Unit], shards: Path, dtype: np.dtype[Any], check: bool) -> list[Unit]:
    """The units whose shards are not there, or damaged, which is looked for wholly in little, or with `check`."""
    by_key: dict[str, Unit] = {}
    for unit in units:
        by_key.setdefault(unit.key, unit)  # of files with the same text the first is told of
    entries = {key: manifest_entry(key, info) for key in by_key if (info := find_info(shards, key)) is not None}
    total = dtype.itemsize * sum(entry["tokens"] for entry in entries.values())
    whole = check or total <= CHECKED_AT_START
    with progress_bar("check", total if whole else 0) as progress, ThreadPoolExecutor(usable_cores()) as pool:

        def is_whole(key: str) -> bool:
            if key not in entries:
                return False
            try:
                check_shard(shards, entries[key], dtype, whole=whole, progress=progress)
            except DamagedFile as error:
                logger.warning("%s: making it again", error)
                return False
            return True

        return [by_key[key] for key, found in zip(by_key, pool.map(is_whole, by_key), strict=True) if not found]


def _key(pieces: Sequence[Piece], settings: str) -> str:
    kinds = [(os.path.splitext(piece.path)[1], piece.sha256) for piece in pieces]
    return hashlib.sha256(json.dumps([settings, kinds]).encode()).hexdigest()[:32]


# -- doing it ---------------------------------------------------------------------------------------------------------


def _make_shards(units: Sequence[Unit], shards: Path, encoder: Encoder, bos: bool, strict: bool, workers: int) -> None:
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


# -- the result -------------------------------------------------------------------------------------------------------


def _problems(
    source: Source,
    made: Sequence[tuple[Unit, ShardInfo]],
    pieces: dict[Path, list[Piece]],
    more: Problem | None = None,
) -> list[Problem]:
    """What is malformed in a source, in the order of its files: in shards that are made, and `more` if it is in it."""
    order = {str(file): number for number, file in enumerate(source.files)}
    found = [Problem(str(file), 0, "the file is empty") for file in source.files if not pieces[file]]
    for unit, info in made:
        for number, line, reason in info.malformed:
            piece = unit.pieces[number]
            found.append(Problem(piece.path, piece.line + line if line else 0, reason))
    if more and more.path in order:
        found.append(more)
    return sorted(found, key=lambda problem: (order[problem.path], problem.line))


def _write_manifest(
    corpus: Corpus,
    units: dict[Source, list[Unit]],
    pieces: dict[Path, list[Piece]],
    out: Path,
    encoder: Encoder,
    fingerprint: str,
    bos: bool,
    strict: bool,
) -> None:
    count = 0
    examples: list[Problem] = []
    described: dict[Source, dict[str, Any]] = {}
    for source, group in units.items():
        made = [(unit, read_info(out / "shards", unit.key)) for unit in group]
        problems = _problems(source, made, pieces)
        count += sum(not pieces[file] for file in source.files)
        shards = []
        for unit, info in made:
            shards.append(manifest_entry(unit.key, info))
            count += info.num_malformed
        if strict and problems:
            raise MalformedLine(problems[0])
        if not any(shard["documents"] for shard in shards):
            reason = f"the first problem: {problems[0]}" if problems else "every line of them is blank"
            raise ValueError(f"source {source.name!r} has no document in its {len(source.files)} file(s); {reason}.")
        examples += problems[: KEPT_EXAMPLES - len(examples)]
        described[source] = {"name": source.name, "weight": source.weight, "shards": shards}
    manifest = {
        "format": FORMAT,
        "tokenizer": fingerprint,
        "vocab_size": encoder.vocab_size,
        "bos": bos,
        "train": [described[source] for source in corpus.train],
        "valid": [described[source] for source in corpus.valid],
        "malformed": {"count": count, "examples": list(map(str, examples))},
    }
    # leave alone what other runs may be reading, unless it changed or was damaged
    if damaged_files(out / "tokenizer") != [] or _unless_damaged(read_manifest, out) != (manifest, True):
        with atomic_folder(out / "tokenizer") as folder:
            encoder.tokenizer.save_pretrained(folder)
            write_listing(folder)
        write_sealed(out / MANIFEST, manifest)


def _unless_damaged(read: Callable[[Path], T], folder: Path) -> T | None:
    """What a JSON file of ours holds; None where there is none, or a damaged one, which is made again."""
    try:
        return read(folder)
    except FileNotFoundError:
        return None
    except ValueError as error:
        logger.warning("%s: making it again", error)
        return None


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
