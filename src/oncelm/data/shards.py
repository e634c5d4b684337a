"""The format of a folder of tokens: what lies on the disk, for all that write it (`oncelm.data.prepare`) or read it.

    FOLDER/tokens.json           which shards hold which source, in order, and of which tokenizer; written last
    FOLDER/tokenizer/            the tokenizer, so that the folder is all that training needs, and its files' checksums
    FOLDER/shards/KEY.tokens     ids, uint16 or uint32, little-endian: every document's, an eos behind each
    FOLDER/shards/KEY.documents  int64 [num_documents]: where each document ends in KEY.tokens
    FOLDER/shards/KEY.json       counts, checksums, and the malformed lines; written last: with it, and the other
                                 two of the sizes that it says, a shard is complete

KEY says what is in the shard: 32 hexadecimal digits, a checksum of all that its tokens follow from.

Every file has a checksum (`oncelm.data.sealed`): those of a shard are in KEY.json and in tokens.json, a JSON file's
is in itself. Folders that earlier versions made have none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oncelm.data.sealed import DamagedFile, file_checksum, read_sealed, write_sealed

FORMAT = 1
MANIFEST, SCAN = "tokens.json", "scan.json"
CHECKED_AT_START = 1 << 30  # bytes of tokens: 0.3 s of one core, or a second of a disk
FILE_NAME = re.compile(r"([0-9a-f]{32})\.(tokens|documents|json)")  # of a shard


@dataclass(frozen=True)
class ShardInfo:
    """KEY.json."""

    num_tokens: int
    num_documents: int
    longest: int  # document, in tokens
    largest_id: int
    num_malformed: int
    malformed: list[tuple[int, int, str]]  # number of the piece, line in it, reason; the first of them
    checksums: dict[str, int] | None = None  # of KEY.tokens and KEY.documents, by suffix; None: of an earlier version


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """How ids below `vocab_size` are stored."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def file_sizes(key: str, num_tokens: int, num_documents: int, dtype: np.dtype[Any]) -> dict[str, int]:
    """Bytes in the files of a whole shard, by name."""
    return {f"{key}.tokens": num_tokens * dtype.itemsize, f"{key}.documents": 8 * num_documents}


def size_on_disk(file: Path) -> int | None:
    """Bytes in a file; None where there is none."""
    return file.stat().st_size if file.exists() else None


def write_info(shards: Path, key: str, info: ShardInfo) -> None:
    """KEY.json, which completes a shard whose other files are there."""
    write_sealed(shards / f"{key}.json", asdict(info))


def read_info(shards: Path, key: str) -> ShardInfo:
    """KEY.json.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is damaged.
    """
    path = shards / f"{key}.json"
    fields, sealed = read_sealed(path)
    try:
        info = ShardInfo(**fields)
    except TypeError:  # not these counts
        raise DamagedFile(f"{path} is damaged") from None
    if not sealed and info.checksums is not None:
        raise DamagedFile(f"{path} is damaged")
    return info


def find_info(shards: Path, key: str) -> ShardInfo | None:
    """KEY.json; None where there is none that can be read: its shard is to be made, or made again."""
    try:
        return read_info(shards, key)
    except (OSError, ValueError):
        return None


def read_scan(folder: Path) -> tuple[dict[str, Any], bool]:
    """scan.json, and whether it has a checksum; errors as those of `read_sealed`."""
    records, sealed = read_sealed(folder / SCAN)
    if not all(isinstance(record, dict) for record in records.values()):
        raise DamagedFile(f"{folder / SCAN} is damaged")
    return records, sealed


def manifest_entry(key: str, info: ShardInfo) -> dict[str, Any]:
    """A shard as tokens.json lists it."""
    return {
        "key": key,
        "tokens": info.num_tokens,
        "documents": info.num_documents,
        "longest": info.longest,
        "largest_id": info.largest_id,
        "checksums": info.checksums,
    }


def check_shard(
    shards: Path,
    entry: dict[str, Any],
    dtype: np.dtype[Any],
    *,
    whole: bool,
    progress: Callable[[int], None] = lambda num_bytes: None,
) -> None:
    """DamagedFile, which names the file, where a shard is not as its entry in tokens.json says.

    Sizes and borders are always looked at, the tokens with `whole`: 16-bit ids at about 3 GB/s on one core.
    """
    key, checksums = entry["key"], entry.get("checksums")
    for name, size in file_sizes(key, entry["tokens"], entry["documents"], dtype).items():
        found = size_on_disk(shards / name)
        if found != size:
            there = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise DamagedFile(f"shard {name} {there}")
    for suffix in ("documents", "tokens") if whole else ("documents",):
        if checksums and file_checksum(shards / f"{key}.{suffix}", progress) != checksums[suffix]:
            raise DamagedFile(f"shard {key}.{suffix} is damaged: its checksum is not that of what was written")
    if not checksums:
        _check_borders(shards / f"{key}.documents", entry["tokens"])
        if whole and entry["tokens"]:
            largest = np.memmap(shards / f"{key}.tokens", dtype, mode="r").max()
            check_ids(f"{key}.tokens", int(largest), entry["largest_id"])


def is_complete(shards: Path, key: str, dtype: np.dtype[Any]) -> bool:
    """Whether a shard is there, of the sizes that KEY.json says."""
    info = find_info(shards, key)
    if info is None:
        return False
    try:
        check_shard(shards, manifest_entry(key, info), dtype, whole=False)
    except DamagedFile:
        return False
    return True


def check_ids(name: str, largest: int, allowed: int) -> None:
    """DamagedFile where a shard holds an id that was never written to it."""
    if largest > allowed:
        raise DamagedFile(f"shard {name} is damaged: it holds token {largest}, and the largest written was {allowed}")


def _check_borders(file: Path, num_tokens: int) -> None:
    """DamagedFile unless documents end one behind the other, the last where the tokens end."""
    ends = np.fromfile(file, "<i8")
    if (np.diff(ends, prepend=0) <= 0).any() or (ends[-1] if len(ends) else 0) != num_tokens:
        raise DamagedFile(f"shard {file.name} is damaged: a document ends before it begins, or behind the tokens")
