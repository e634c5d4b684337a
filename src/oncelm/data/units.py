"""Which text becomes which shard, and which shards are still missing.

A shard's key is a checksum of the text's bytes, the tokenizer and the format. So a shard on disk
is what would be computed now, whichever run made it, and is never computed twice.

    FOLDER/scan.json  size, time and checksums of the text's files, so that a restart need not read them
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oncelm.data.layout import Corpus, Source
from oncelm.data.progress import progress_bar
from oncelm.data.reading import Piece, is_text, scan
from oncelm.data.sealed import DamagedFile, unless_damaged, write_sealed
from oncelm.data.shards import CHECKED_AT_START, SCAN, check_shard, find_info, manifest_entry, read_scan
from oncelm.utils.environment import usable_cores

logger = logging.getLogger(__name__)

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


def scan_all(corpus: Corpus, out: Path, workers: int) -> dict[Path, list[Piece]]:
    """The pieces of every file; files whose size and time are as they were are not read again."""
    before, sealed = unless_damaged(read_scan, out) or ({}, False)
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


def units_of(source: Source, pieces: dict[Path, list[Piece]], settings: str) -> list[Unit]:
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


def find_missing(units: Sequence[Unit], shards: Path, dtype: np.dtype[Any], check: bool) -> list[Unit]:
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
