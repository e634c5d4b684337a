"""The format of a folder of tokens: what lies on the disk, for all that write it (`oncelm.data.prepare`) or read it.

    FOLDER/tokens.json           which shards hold which source, in order, and of which tokenizer; written last
    FOLDER/tokenizer/            the tokenizer, so that the folder is all that training needs
    FOLDER/shards/KEY.tokens     ids, uint16 or uint32, little-endian: every document's, an eos behind each
    FOLDER/shards/KEY.documents  int64 [num_documents]: where each document ends in KEY.tokens
    FOLDER/shards/KEY.json       counts, and the malformed lines; written last: with it, and the other two of
                                 the sizes that it says, a shard is complete

KEY says what is in the shard: 32 hexadecimal digits, a checksum of all that its tokens follow from.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oncelm.utils.files import write_json
from oncelm.utils.settings import parse_json

FORMAT = 1
MANIFEST = "tokens.json"
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
    write_json(shards / f"{key}.json", asdict(info))


def read_info(shards: Path, key: str) -> ShardInfo:
    """KEY.json.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is damaged.
    """
    path = shards / f"{key}.json"
    try:
        return ShardInfo(**parse_json(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):  # no JSON, or not these counts
        raise ValueError(f"{path} is damaged; prepare again.") from None


def find_info(shards: Path, key: str) -> ShardInfo | None:
    """KEY.json; None where there is none that can be read: its shard is to be made, or made again."""
    try:
        return read_info(shards, key)
    except (OSError, ValueError):
        return None


def is_complete(shards: Path, key: str, dtype: np.dtype[Any]) -> bool:
    """Whether KEY.json can be read and the other files are of the sizes that it says."""
    info = find_info(shards, key)
    if info is None:
        return False
    sizes = file_sizes(key, info.num_tokens, info.num_documents, dtype)
    return all(size_on_disk(shards / name) == size for name, size in sizes.items())


def manifest_entry(key: str, info: ShardInfo) -> dict[str, Any]:
    """A shard as tokens.json lists it."""
    return {
        "key": key,
        "tokens": info.num_tokens,
        "documents": info.num_documents,
        "longest": info.longest,
        "largest_id": info.largest_id,
    }
