"""Token streams: shards on disk, an array in memory, or parts of either, read at any position.

A stream is the tokens of all documents of a source, one after the other. Only the number of tokens of each shard is in
memory: a position is found by bisection and read from a memory map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from oncelm.data.sealed import DamagedFile, damaged_files, read_sealed
from oncelm.data.shards import CHECKED_AT_START, FORMAT, MANIFEST, check_ids, check_shard, token_dtype
from oncelm.utils.errors import printable

FIELDS = {"format", "tokenizer", "vocab_size", "bos", "train", "valid", "malformed"}  # of tokens.json


class Stream(Protocol):
    """Tokens in a row, of documents."""

    num_tokens: int

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens `start` to `stop`, [stop - start], of any unsigned type."""

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        """Positions p, start < p < stop, at which a document begins: ascending int64."""


S = TypeVar("S", bound=Stream, covariant=True)


@dataclass(frozen=True)
class TokenSource(Generic[S]):
    """A stream with its share of the training."""

    name: str
    weight: float
    stream: S


@dataclass(frozen=True)
class TokenFolder:
    """A prepared folder: `manifest` is its tokens.json."""

    path: Path
    manifest: dict[str, Any]
    train: tuple[TokenSource[ShardStream], ...]
    valid: tuple[TokenSource[ShardStream], ...]

    @property
    def largest_id(self) -> int:
        return max(shard["largest_id"] for shard in shard_entries(self.manifest).values())


def is_token_folder(path: str | Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


def read_manifest(folder: Path) -> tuple[dict[str, Any], bool]:
    """tokens.json, and whether it has checksums; ValueError where it is damaged, or of another version."""
    manifest, sealed = read_sealed(folder / MANIFEST)
    if not sealed and set(manifest) != FIELDS:
        raise DamagedFile(
            f"{folder / MANIFEST} is damaged: it has the entries {', '.join(map(printable, sorted(manifest)))}"
        )
    if manifest["format"] != FORMAT:
        raise ValueError(f"it is of format {manifest['format']}, this version reads {FORMAT}")
    return manifest, sealed


def shard_entries(manifest: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What tokens.json says of every shard, by key."""
    every = (shard for split in ("train", "valid") for source in manifest[split] for shard in source["shards"])
    return {shard["key"]: shard for shard in every}


def open_tokens(path: str | Path) -> TokenFolder:
    """A folder that `oncelm data prepare` made; ValueError where shards are missing, cut off or damaged.

    The borders of documents and the tokenizer are looked at wholly, tokens where all of them are at most
    `CHECKED_AT_START` bytes: a run's start is no time to read a terabyte (`oncelm data check` does). What is read of
    more is within the vocabulary, or an error.
    """
    folder = Path(path)
    if not is_token_folder(folder):
        raise ValueError(f"{str(folder)!r} holds no prepared tokens (no {MANIFEST}); make them: oncelm data prepare.")
    try:
        manifest, _ = read_manifest(folder)
        if damaged := damaged_files(folder / "tokenizer"):
            raise DamagedFile(f"{damaged[0]} is damaged")
        dtype = token_dtype(manifest["vocab_size"])
        shards = shard_entries(manifest)
        whole = dtype.itemsize * sum(shard["tokens"] for shard in shards.values()) <= CHECKED_AT_START
        for shard in shards.values():
            check_ids(f"{shard['key']}.tokens", shard["largest_id"], manifest["vocab_size"] - 1)
            check_shard(folder / "shards", shard, dtype, whole=whole)
        train, valid = (
            tuple(
                TokenSource(source["name"], source["weight"], ShardStream(folder / "shards", source["shards"], dtype))
                for source in manifest[split]
            )
            for split in ("train", "valid")
        )
    except (ValueError, KeyError, TypeError, OSError) as error:  # OSError: of a shard whose name no file can have
        raise ValueError(
            f"{folder / MANIFEST} cannot be used: {str(error)[:300]}; run oncelm data prepare again."
        ) from None
    return TokenFolder(folder, manifest, train, valid)


class ArrayStream:
    """One document in memory."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens
        self.num_tokens = len(tokens)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.tokens[start:stop]

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        return np.empty(0, dtype=np.int64)


class ShardStream:
    """The shards of one source.

    Args:
        folder: of the shards.
        shards: {"key", "tokens", "documents", "largest_id"} of each, in order.
        dtype: of the tokens.
    """

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]], dtype: np.dtype[Any]) -> None:
        self.folder, self.shards, self.dtype = folder, shards, dtype
        self.bounds = np.cumsum([0, *(shard["tokens"] for shard in shards)])
        self.num_tokens = int(self.bounds[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        parts = [self._read_shard(*span) for span in self._spans(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, self.dtype)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        found = []
        for shard, low, high in self._spans(start, stop):
            base, ends = int(self.bounds[shard]), self.document_ends(shard)
            # documents start where the one before ended, and at the shard's own start
            first, last = np.searchsorted(ends, low, side="right"), np.searchsorted(ends, high)
            if low == 0 and base > start:
                found.append(np.array([base]))
            found.append(np.asarray(ends[first:last]) + base)
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def document_ends(self, shard: int) -> np.ndarray:
        """Where the documents of a shard end, counted in the shard: int64 [num_documents]."""
        info = self.shards[shard]
        return _mapped(self.folder / f"{info['key']}.documents", "<i8", info["documents"])

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Where documents start and end, int64 [N] both, shard by shard."""
        for shard in range(len(self.shards)):
            ends = self.document_ends(shard) + self.bounds[shard]
            yield np.concatenate([self.bounds[shard : shard + 1], ends])[:-1], ends

    def _read_shard(self, shard: int, low: int, high: int) -> np.ndarray:
        info = self.shards[shard]
        tokens = _mapped(self.folder / f"{info['key']}.tokens", self.dtype.str, info["tokens"])[low:high]
        check_ids(f"{info['key']}.tokens", int(tokens.max()), info["largest_id"])
        return tokens

    def _spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The shards that hold tokens `start` to `stop`, each with the bounds of its part."""
        for shard, low, high in _pieces_between(self.bounds, start, stop):
            base = int(self.bounds[shard])
            yield shard, low - base, high - base


@lru_cache(maxsize=256)  # an open map holds a file handle, of which there are not many
def _mapped(path: Path, dtype: str, size: int) -> np.ndarray:
    return np.memmap(path, dtype, mode="r", shape=(size,)) if size else np.empty(0, dtype)


def _pieces_between(bounds: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """(part, low, high) of the parts that hold `start` to `stop`; part i goes from bounds[i] to bounds[i + 1]."""
    part = int(np.searchsorted(bounds, start, side="right")) - 1
    while start < stop:
        high = min(stop, int(bounds[part + 1]))
        if high > start:
            yield part, start, high
            start = high
        part += 1


class SpanStream:
    """Parts of a stream as a stream.

    Args:
        stream: to take from.
        starts, lengths: int64 [N] of the parts, in order and apart from each other.
    """

    def __init__(self, stream: Stream, starts: np.ndarray, lengths: np.ndarray) -> None:
        self.stream, self.starts = stream, starts
        self.bounds = np.concatenate([[0], np.cumsum(lengths)])
        self.num_tokens = int(self.bounds[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        parts = [self.stream.read(low, high) for _, low, high in self._pieces(start, stop)]
        return np.concatenate(parts) if parts else np.empty(0, np.uint32)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        found = []
        for position, low, high in self._pieces(start, stop):
            if position > start:  # a part that begins here: what was before it is another document's
                found.append(np.array([position]))
            found.append(self.stream.document_starts(low, high) - low + position)
        return np.concatenate(found) if found else np.empty(0, dtype=np.int64)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(position here, bounds in the stream) of what tokens `start` to `stop` are made of."""
        for part, low, high in _pieces_between(self.bounds, start, stop):
            shift = int(self.starts[part]) - int(self.bounds[part])
            yield low, low + shift, high + shift


class DocumentStream(SpanStream):
    """Spans each of which is a document."""

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Where documents start and end."""
        yield self.bounds[:-1], self.bounds[1:]


def split_by_length(
    stream: ShardStream | DocumentStream, stop: int, threshold: int
) -> tuple[DocumentStream, SpanStream]:
    """The documents of at least `threshold` tokens, and all others, each as a stream.

    Only what lies before token `stop` counts; a document that reaches beyond it is cut there. The index takes
    32 bytes a long document.
    """
    starts, lengths = [], []
    for begins, ends in stream.documents():
        found = np.minimum(ends, stop) - begins
        long = found >= threshold
        starts.append(begins[long])
        lengths.append(found[long])
    long_starts = np.concatenate(starts)
    long_lengths = np.concatenate(lengths)
    gap_starts = np.concatenate([[0], long_starts + long_lengths])
    gap_lengths = np.concatenate([long_starts, [stop]]) - gap_starts
    return DocumentStream(stream, long_starts, long_lengths), SpanStream(stream, gap_starts, gap_lengths)
