"""Damage to a cache file, and kills while it is written: refused, or the file that was written, never another."""

from __future__ import annotations

import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from oncelm.cache import load_snapshot, save_snapshot
from oncelm.cache.base import Snapshot
from tests.models.small import VOCAB, make_long, make_model

MODELS = {
    "retention": make_model("retention"),
    "window": make_model("window"),
    "long": make_long(),
    "long int8": make_long(mem_dtype="int8"),
}
kinds = pytest.mark.parametrize("kind", MODELS)
OTHERS = b' \t\n,:[]{}"0129\\\x00\xff'  # what may stand for another structure where a byte of JSON stood


def make_snapshot(kind: str, tokens: int = 20) -> Snapshot:
    cache = MODELS[kind].new_cache(1, 40)
    ids = torch.randint(0, VOCAB, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    with torch.no_grad():
        MODELS[kind](ids, past_key_values=cache, use_cache=True)
    return cache.snapshot()


def same(a: Snapshot, b: Snapshot) -> bool:
    return (
        (a.lengths, a.columns, a.tensors.keys()) == (b.lengths, b.columns, b.tensors.keys())
        and all(a.tensors[name].dtype == b.tensors[name].dtype for name in a.tensors)
        and all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)
    )


@pytest.fixture
def written(kind: str, tmp_path: Path) -> tuple[Path, Snapshot, bytes]:
    """A file, what it holds, and its bytes."""
    snapshot = make_snapshot(kind)
    save_snapshot(snapshot, tmp_path / "cache", "mark")
    return tmp_path / "cache", snapshot, (tmp_path / "cache").read_bytes()


def loads(path: Path, data: bytes) -> Snapshot | None:
    """The snapshot in these bytes; None where they are refused as they should be."""
    path.write_bytes(data)
    try:
        return load_snapshot(path, "mark")
    except ValueError:
        return None


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def flips(data: bytes, places: Any) -> Iterator[tuple[int, bytes]]:
    for place in places:
        for bit in range(8):
            yield place, data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


@kinds
def test_flipped_bits_are_refused(written) -> None:
    path, _, data = written
    places = random.Random(0).sample(range(len(data)), 60)
    assert [place for place, flipped in flips(data, places) if loads(path, flipped) is not None] == []


def test_a_header_with_the_shape_of_a_single_number_is_refused(tmp_path: Path) -> None:
    save_snapshot(make_snapshot("long"), tmp_path / "cache", "mark")
    whole = (tmp_path / "cache").read_bytes()
    damaged = whole.replace(b'"shape":[1]', b'"shape":[ ]')
    assert damaged != whole
    (tmp_path / "cache").write_bytes(damaged)
    with pytest.raises(ValueError, match="is damaged"):
        load_snapshot(tmp_path / "cache", "mark")


@pytest.mark.slow
@kinds
def test_every_byte_of_a_header_damaged(written) -> None:
    path, snapshot, data = written
    size = header_size(data)
    assert [place for place, flipped in flips(data, range(size)) if loads(path, flipped) is not None] == []
    for place in range(size):
        for other in OTHERS:
            found = loads(path, data[:place] + bytes([other]) + data[place + 1 :])
            assert found is None or same(found, snapshot)  # JSON may have other spaces


@pytest.mark.slow
@kinds
def test_files_cut_off_or_longer_are_refused(written) -> None:
    path, _, data = written
    for size in [*range(header_size(data) + 8), *range(header_size(data) + 8, len(data), 97)]:
        assert loads(path, data[:size]) is None
    assert loads(path, data + b"\0") is None


@pytest.mark.slow
def test_kills_while_a_cache_is_saved_again_and_again(tmp_path: Path) -> None:
    """Each file read after a kill is whole, one of the two that are written in turn; the next save leaves it alone."""
    path = tmp_path / "cache"
    size = 2_000_000
    snapshots = [Snapshot({"x": torch.full((size,), float(i))}, (i,), i) for i in (1, 2)]
    fork = multiprocessing.get_context("fork")

    def save_for_ever() -> None:
        while True:
            for snapshot in snapshots:
                save_snapshot(snapshot, path, "mark")

    save_snapshot(snapshots[0], path, "mark")
    draw, left = random.Random(0), 0
    for _ in range(100):
        process = fork.Process(target=save_for_ever)
        process.start()
        time.sleep(0.02 + 0.1 * draw.random())
        process.kill()
        process.join()
        assert len(os.listdir(tmp_path)) <= 2  # of a kill before nothing is left
        left += len(os.listdir(tmp_path)) == 2
        found = load_snapshot(path, "mark")
        assert any(same(found, snapshot) for snapshot in snapshots)
    assert left > 30  # it was within a save that most of them came
    save_snapshot(snapshots[0], path, "mark")
    assert os.listdir(tmp_path) == ["cache"]
