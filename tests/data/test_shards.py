"""The format on the disk: what is written is read back, and only whole shards count as complete."""

from __future__ import annotations

import dataclasses
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncelm.data.sealed import DamagedFile
from oncelm.data.shards import (
    FILE_NAME,
    ShardInfo,
    check_shard,
    file_sizes,
    find_info,
    manifest_entry,
    read_info,
    token_dtype,
    write_info,
)

KEY = f"{7:032x}"
DTYPE = np.dtype("<u2")
IDS, ENDS = np.array([1, 9, 0, 2, 0], DTYPE), np.array([3, 5], "<i8")
SUMS = {"tokens": zlib.crc32(IDS.tobytes()), "documents": zlib.crc32(ENDS.tobytes())}
INFO = ShardInfo(
    num_tokens=5,
    num_documents=2,
    longest=3,
    largest_id=9,
    num_malformed=1,
    malformed=[[0, 4, "not JSON"]],
    checksums=SUMS,
)


def is_complete(shards: Path, key: str, dtype: np.dtype, info: ShardInfo | None = None) -> bool:
    info = info or find_info(shards, key)
    try:
        check_shard(shards, manifest_entry(key, info), dtype, whole=True) if info else None
    except DamagedFile:
        return False
    return info is not None


@pytest.fixture
def shards(tmp_path) -> Path:
    """A folder with one whole shard."""
    IDS.tofile(tmp_path / f"{KEY}.tokens")
    ENDS.tofile(tmp_path / f"{KEY}.documents")
    write_info(tmp_path, KEY, INFO)
    return tmp_path


@given(st.integers(1, 1 << 32))
def test_ids_are_stored_in_as_few_bytes_as_the_vocabulary_allows(vocab_size) -> None:
    dtype = token_dtype(vocab_size)
    assert np.array([vocab_size - 1], dtype)[0] == vocab_size - 1
    assert dtype.itemsize == (2 if vocab_size <= 65_536 else 4)
    assert dtype.newbyteorder("<") == dtype


def test_a_shard_is_read_back_as_it_was_written(shards) -> None:
    assert read_info(shards, KEY) == find_info(shards, KEY) == INFO
    assert manifest_entry(KEY, INFO) == {
        "key": KEY,
        "tokens": 5,
        "documents": 2,
        "longest": 3,
        "largest_id": 9,
        "checksums": SUMS,
    }
    sizes = {file.name: file.stat().st_size for file in shards.iterdir() if file.suffix != ".json"}
    assert file_sizes(KEY, 5, 2, DTYPE) == sizes
    assert all(FILE_NAME.fullmatch(file.name)[1] == KEY for file in shards.iterdir())


@pytest.mark.parametrize("suffix", ["tokens", "documents", "json"])
def test_only_a_shard_with_all_its_files_is_complete(shards, suffix) -> None:
    assert is_complete(shards, KEY, DTYPE)
    assert not is_complete(shards, KEY, np.dtype("<u4"))
    (shards / f"{KEY}.{suffix}").unlink()
    assert not is_complete(shards, KEY, DTYPE)


@pytest.mark.parametrize("suffix", ["tokens", "documents"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_shard_with_a_file_of_another_size_is_not_complete(shards, suffix, change) -> None:
    file = shards / f"{KEY}.{suffix}"
    os.truncate(file, file.stat().st_size + change)
    assert not is_complete(shards, KEY, DTYPE)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"num_tokens": 5, "num', bytes(9), b"\xff\xfe", b"null", b"[]", b'{"num_tokens": 5}', b'{"tokens": 5}'],
)
def test_a_shard_whose_counts_cannot_be_read_is_not_complete(shards, content) -> None:
    (shards / f"{KEY}.json").write_bytes(content)
    assert find_info(shards, KEY) is None
    assert not is_complete(shards, KEY, DTYPE)
    with pytest.raises(ValueError, match=rf"{KEY}\.json is damaged"):
        read_info(shards, KEY)


def test_flipped_bits_of_a_shard_are_noticed(shards) -> None:
    for file in sorted(shards.iterdir()):
        content = file.read_bytes()
        for bit in range(0, 8 * len(content), 7):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            file.write_bytes(flipped)
            assert not is_complete(shards, KEY, DTYPE), (file.name, bit)
        file.write_bytes(content)
    assert is_complete(shards, KEY, DTYPE)


@pytest.mark.parametrize(("ends", "whole"), [([3, 5], True), ([5, 3], False), ([3, 6], False), ([5, 5], False)])
def test_without_checksums_borders_and_the_largest_id_are_looked_at(shards, ends, whole) -> None:
    info = dataclasses.replace(INFO, checksums=None)
    np.array(ends, "<i8").tofile(shards / f"{KEY}.documents")
    assert is_complete(shards, KEY, DTYPE, info) == whole
    assert not is_complete(shards, KEY, DTYPE, dataclasses.replace(info, largest_id=8))
