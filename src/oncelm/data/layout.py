"""Where text is: a corpus folder with weighted sources, a folder of files, or one file.

A corpus folder says what it holds in JSON:

    DATA/json/train.json    [{"name": "books", "weight": 3}, {"name": "code", "count": 120000}]
    DATA/json/valid.json    the same, for measuring; may be absent
    DATA/json/books.json    ["shards/books-0.jsonl", "/elsewhere/books-1.jsonl.zst"]: absolute, or relative to DATA

`weight` (or `count`, where there is no weight) is a source's share of the sequences seen, relative to the others'.
In any other folder, every .txt, .jsonl, .jsonl.gz, .jsonl.zst and .parquet file below it is one source together.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oncelm.data.folder import LeftOut, Listing, list_folder
from oncelm.utils.errors import unknown
from oncelm.utils.settings import read_json

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
TRAIN, VALID = "json/train.json", "json/valid.json"


@dataclass(frozen=True)
class Source:
    """Files that are mixed into the training with one weight."""

    name: str
    weight: float
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Corpus:
    """What a path stands for: sources to train on, and sources to measure on (possibly none)."""

    path: Path
    train: tuple[Source, ...]
    valid: tuple[Source, ...] = ()
    left_out: str = ""  # what of the folder is not read, in words

    @property
    def sources(self) -> tuple[Source, ...]:
        return (*self.train, *self.valid)

    def num_bytes(self) -> int:
        return sum(file.stat().st_size for source in self.sources for file in source.files)


def find_corpus(path: str | Path) -> Corpus:
    """The corpus at `path`; ValueError where something it names is not there."""
    root = Path(path)
    if root.is_file():
        return Corpus(root, (Source(root.stem, 1.0, (root,)),))
    if not root.is_dir():
        raise ValueError(f"data {str(root)!r} does not exist; give a text file, a folder of text or a corpus folder.")
    if (root / TRAIN).is_file():
        train = _read_sources(root, TRAIN)
        valid = _read_sources(root, VALID) if (root / VALID).exists() else ()
        return Corpus(root, train, valid, _unlisted(root, (*train, *valid)).describe())
    listing = list_folder(root, SUFFIXES)  # what is hidden was not put there to be read; prepared tokens are
    if not listing.files:
        reason = f"; {listing.describe()}" if listing.left_out else ""
        raise ValueError(
            f"data {str(root)!r} holds no {', '.join(SUFFIXES)} file and no {TRAIN}; give a folder that does{reason}."
        )
    return Corpus(root, (Source(root.resolve().name, 1.0, listing.files),), left_out=listing.describe())


def _unlisted(root: Path, sources: Iterable[Source]) -> Listing:
    """What lies in a corpus folder and belongs to none of its sources that have a weight."""
    listing = list_folder(root, ("",))
    read = {os.path.realpath(file) for source in sources for file in source.files}
    named = {"train", "valid", *(source.name for source in sources)}
    read |= {os.path.realpath(root / "json" / f"{name}.json") for name in named}
    unlisted = [file for file in listing.files if os.path.realpath(file) not in read]
    return Listing(root, (), (*listing.left_out, *(LeftOut(file, "in no source with a weight") for file in unlisted)))


def _read_sources(root: Path, name: str) -> tuple[Source, ...]:
    """The sources that a train.json or valid.json lists; those of weight 0 are left out."""
    listing = root / name
    entries = read_json(listing, encoding="utf-8-sig")
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'{listing} must hold a list such as [{{"name": "books", "weight": 1}}], got {entries!r:.60}.')
    weights: dict[str, float] = {}
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ValueError(f'{listing}: every entry needs a "name", got {entry!r:.100}.')
        if entry["name"] in weights:
            raise ValueError(f"{listing}: source {entry['name']!r} is listed twice; give it once, with one weight.")
        weights[entry["name"]] = _weight(listing, entry)
    if not sum(weights.values()):
        raise ValueError(f"{listing}: the weights sum to 0; give at least one source a weight above 0.")
    return tuple(Source(name, weight, _read_files(listing, name)) for name, weight in weights.items() if weight)


def _weight(listing: Path, entry: dict[str, Any]) -> float:
    weight = entry.get("weight")
    if weight is None:
        weight = entry.get("count")
    if weight is None:
        raise ValueError(f'{listing}: source {entry["name"]!r} needs a "weight" (or a "count").')
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise ValueError(f"{listing}: the weight of {entry['name']!r} must be a number of at least 0, got {weight!r}.")
    return float(weight)


def _read_files(sources: Path, name: str) -> tuple[Path, ...]:
    """The files of a source that `sources`, a train.json or valid.json, lists."""
    root, listing = sources.parent.parent, sources.with_name(f"{name}.json")
    if not listing.is_file():
        error = unknown("source", name, sorted({p.stem for p in listing.parent.glob("*.json")} - {"train", "valid"}))
        raise ValueError(f"{sources} names {name!r}, but there is no file {str(listing)!r} of its files: {error}")
    entries = read_json(listing, encoding="utf-8-sig")
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{listing} must hold a list of file names, got {entries!r:.60}.")
    files: dict[Path, None] = {}  # in order
    for entry in entries:
        file = root / entry
        if not file.is_file():
            raise ValueError(f"{listing} names {entry!r}, but there is no file {str(file)!r}.")
        if file in files:
            raise ValueError(f"{listing} names {entry!r} twice.")
        files[file] = None
    return tuple(files)
