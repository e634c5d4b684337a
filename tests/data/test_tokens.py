"""Streams give the tokens and the documents' starts of any range, across shards and parts."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.data.tokens import ArrayStream, ShardStream, SpanStream, split_by_length

KEYS = itertools.count()
lengths = st.lists(st.lists(st.integers(1, 12), max_size=6), min_size=1, max_size=5)  # of documents, by shard


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("shards")


def make_stream(folder: Path, shards: list[list[int]]) -> tuple[ShardStream, np.ndarray]:
    """A stream whose documents have these lengths, and all its tokens; a document is its number, repeated."""
    infos, every, number = [], [], 0
    for documents in shards:
        tokens = []
        for length in documents:
            tokens += [number] * length
            number += 1
        key = f"{next(KEYS)}"
        np.array(tokens, dtype="<u2").tofile(folder / f"{key}.tokens")
        np.cumsum(documents, dtype="<i8").tofile(folder / f"{key}.documents")
        infos.append({"key": key, "tokens": len(tokens), "documents": len(documents), "largest_id": number})
        every += tokens
    return ShardStream(folder, infos, np.dtype("<u2")), np.array(every, dtype=np.int64)


def starts_in(tokens: np.ndarray, start: int, stop: int) -> list[int]:
    """Positions between start and stop, without start, where the document's number changes."""
    return [p for p in range(start + 1, stop) if tokens[p] != tokens[p - 1]]


@settings(max_examples=100, deadline=None)
@given(shards=lengths, data=st.data())
def test_any_range_of_any_shards(folder: Path, shards: list[list[int]], data) -> None:
    stream, tokens = make_stream(folder, shards)
    assert stream.num_tokens == len(tokens)
    start = data.draw(st.integers(0, len(tokens)))
    stop = data.draw(st.integers(start, len(tokens)))
    assert stream.read(start, stop).tolist() == tokens[start:stop].tolist()
    assert stream.document_starts(start, stop).tolist() == starts_in(tokens, start, stop)


@settings(max_examples=100, deadline=None)
@given(shards=lengths, threshold=st.integers(1, 13), data=st.data())
def test_long_documents_and_the_others_are_all_there_is(folder: Path, shards, threshold: int, data) -> None:
    stream, tokens = make_stream(folder, shards)
    stop = data.draw(st.integers(0, len(tokens)))
    least = data.draw(st.integers(1, 3))  # of what shorter documents were taken out of before
    if least > 1:
        stream = split_by_length(stream, len(tokens), least)[0]
        tokens = tokens[np.bincount(tokens, minlength=1)[tokens] >= least]
        stop = min(stop, len(tokens))
    parts = split_by_length(stream, stop, threshold)
    sizes = np.bincount(tokens[:stop], minlength=1) if stop else np.zeros(1)
    for part, wanted in zip(parts, (sizes >= threshold, sizes < threshold), strict=True):
        here = np.array([token for token in tokens[:stop] if wanted[token]])
        assert part.num_tokens == len(here)
        start = data.draw(st.integers(0, len(here)))
        end = data.draw(st.integers(start, len(here)))
        assert part.read(start, end).tolist() == here[start:end].tolist()
        assert part.document_starts(start, end).tolist() == starts_in(here, start, end)


def test_parts_of_an_array() -> None:
    part = SpanStream(ArrayStream(np.arange(100)), np.array([10, 50]), np.array([5, 3]))
    assert part.read(0, 8).tolist() == [10, 11, 12, 13, 14, 50, 51, 52]
    assert part.read(4, 6).tolist() == [14, 50]
    assert part.document_starts(0, 8).tolist() == [5]


def test_more_shards_than_file_handles_can_be_read(folder: Path) -> None:
    stream, tokens = make_stream(folder, [[3]] * 600)
    for _ in range(2):
        assert stream.read(0, len(tokens)).tolist() == tokens.tolist()


def test_an_id_that_was_never_written_is_an_error(folder: Path) -> None:
    stream, _ = make_stream(folder, [[3, 2]])
    np.array([0, 0, 0, 1, 2049], "<u2").tofile(folder / f"{stream.shards[0]['key']}.tokens")
    assert stream.read(0, 4).tolist() == [0, 0, 0, 1]
    with pytest.raises(ValueError, match=r"shard \d+\.tokens is damaged: it holds token 2049, and the largest written"):
        stream.read(2, 5)
