"""Token streams to training batches that depend on (seed, step) alone.

    sources -> blocks of `seq_len` tokens -> row k of the run = (source, block) -> batches [B, T]

A batch is computed from its step number, never from what was drawn before it, so that a resumed run sees exactly
the batches it would have seen, on any number of ranks: there is no iterator whose position could be lost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from oncelm.data.batch import TrainBatch
from oncelm.data.sampler import Schedule, permute
from oncelm.data.tokens import ArrayStream, DocumentStream, ShardStream, Stream, TokenSource, split_by_length


@dataclass(frozen=True)
class Blocks:
    """Blocks `first` to `last` of a stream; block i is the `seq_len` tokens from i (seq_len - 1) on.

    Each block starts with the last token of the block before, so that every token but the stream's first is
    predicted once (a model predicts `seq_len - 1` tokens of a block). Documents are packed one behind the other;
    one that is longer than a block goes on in the next.
    """

    name: str
    stream: Stream
    seq_len: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def read(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of a block, [seq_len], and where in it documents begin (but at its start)."""
        start = self.start(block)
        stop = start + self.seq_len
        return self.stream.read(start, stop), self.stream.document_starts(start, stop) - start

    def start(self, block: int) -> int:
        """Where a block begins in the stream."""
        return (self.first + block) * (self.seq_len - 1)


class TokenDataset:
    """Sequences of several sources, mixed by weight, each source shuffled anew in every epoch of its own.

    Tokens that fill no block, fewer than `seq_len` at the end of a source, are left out.

    Args:
        tokens: one stream of ids in memory, [num_tokens], or sources (`open_tokens(folder).train`).
        seq_len: tokens in a sequence, at least 2.
        seed: of the mixture and the shuffles.
        validation: sources that are held out (`open_tokens(folder).valid`).
        validation_fraction: where there are none: the share of every source's blocks, from its end, rounded up to a
            whole block, that is held out; 0 for none.
        long_documents: documents of at least so many tokens are seen `long_factor` times as often as the others
            of their source; the shares of the sources stay. Needs prepared sources. None: all alike.
        long_factor: above 0.
        min_tokens: documents of fewer tokens are left out, of what is held out too. Needs prepared sources.
        document_masking: documents see themselves only (`TrainBatch.lengths`), though several are in a sequence.
    """

    def __init__(
        self,
        tokens: np.ndarray | Sequence[TokenSource[Stream]],
        seq_len: int,
        *,
        seed: int = 0,
        validation: Sequence[TokenSource[Stream]] = (),
        validation_fraction: float = 0.05,
        long_documents: int | None = None,
        long_factor: float = 1.0,
        min_tokens: int | None = None,
        document_masking: bool = False,
    ) -> None:
        if seq_len < 2:
            raise ValueError(f"seq_len must be at least 2 (one token and the next), got {seq_len}.")
        if not 0 <= validation_fraction < 1:
            raise ValueError(f"validation_fraction must be at least 0 and below 1, got {validation_fraction}.")
        if long_factor <= 0:
            raise ValueError(f"long_factor must be above 0, got {long_factor}.")
        self.seq_len, self.seed, self.document_masking = seq_len, seed, document_masking
        sources: Sequence[TokenSource[Stream]]
        sources = [TokenSource("text", 1.0, ArrayStream(tokens))] if isinstance(tokens, np.ndarray) else tokens
        if min_tokens is not None:
            sources = [_without_short(source, min_tokens) for source in sources]
            validation = [_without_short(source, min_tokens) for source in validation]
        if validation:
            validation_fraction = 0.0
        train, held_out, weights = [], [], []
        for source in sources:
            blocks, rest = self._hold_out(source, validation_fraction)
            held_out.append(rest)
            parts = [(blocks, 1.0)]
            if long_documents is not None and long_factor != 1:
                stop = blocks.start(len(blocks)) + 1 if len(rest) else source.stream.num_tokens
                parts = self._strata(blocks, stop, long_documents, long_factor)
            train += [part for part, _ in parts]
            weights += [source.weight * share for _, share in parts]
        held_out += [self._hold_out(source, 0.0)[0] for source in validation]
        self._train = train
        self._schedule = Schedule(weights, seed)
        self._validation = [blocks for blocks in held_out if len(blocks)]
        self._validation_schedule = Schedule([len(blocks) for blocks in self._validation]) if self._validation else None
        self.num_train_blocks = sum(map(len, train))
        self.num_validation_blocks = sum(map(len, self._validation))

    def batch(self, step: int, count: int, rows: slice | None = None) -> TrainBatch:
        """The sequences of one step, [B, T]: a pure function of (seed, step) for a given count.

        Args:
            count: sequences of the whole step, over all ranks.
            rows: ascending; read these rows of the step only, as each rank does. None: all.
        """
        return self._read(self._located(step, count, rows))

    def num_targets(self, step: int, count: int) -> int:
        """Tokens that are predicted in a step: all but the first of each sequence, or of each document in it."""
        if not self.document_masking:
            return count * (self.seq_len - 1)
        return count * self.seq_len - len(self._lengths(self._located(step, count, None)))

    def locate(self, k: int) -> tuple[Blocks, int]:
        """Where row k of the run comes from (row r of step s of batch size B is row s B + r): (blocks, block)."""
        part, drawn = self._schedule.locate(k)
        blocks = self._train[part]
        epoch, index = divmod(drawn, len(blocks))
        return blocks, permute(index, len(blocks), self.seed, part, epoch)

    def describe(self, k: int) -> str:
        """Where row k of the run comes from, in words."""
        blocks, block = self.locate(k)
        start = blocks.start(block)
        return f"tokens {start:,} to {start + self.seq_len:,} of source {blocks.name!r}"

    def validation_batches(self, count: int) -> Iterator[TrainBatch]:
        """All held-out sequences, [B, T] each, always in the same order; the last batch may be smaller.

        The order is mixed, so that the first few batches are a fair sample of all.
        """
        for start in range(0, self.num_validation_blocks, count):
            yield self._read(self._validation_rows(start, count))

    def _located(self, step: int, count: int, rows: slice | None) -> list[tuple[Blocks, int]]:
        return [self.locate(step * count + row) for row in range(count)[rows or slice(None)]]

    def _validation_rows(self, start: int, count: int) -> list[tuple[Blocks, int]]:
        found = []
        for k in range(start, min(start + count, self.num_validation_blocks)):
            assert self._validation_schedule is not None
            part, index = self._validation_schedule.locate(k)
            blocks = self._validation[part]
            found.append((blocks, permute(index, len(blocks), "validation", part)))
        return found

    def _read(self, rows: Sequence[tuple[Blocks, int]]) -> TrainBatch:
        tokens = np.empty((len(rows), self.seq_len), dtype=np.int64)
        for out, (blocks, block) in zip(tokens, rows, strict=True):
            out[:] = blocks.read(block)[0]
        return TrainBatch(torch.from_numpy(tokens), lengths=self._lengths(rows) if self.document_masking else None)

    def _lengths(self, rows: Sequence[tuple[Blocks, int]]) -> tuple[int, ...]:
        """Tokens of each document, or part of one, in these rows."""
        lengths: list[int] = []
        for blocks, block in rows:
            start = blocks.start(block)
            inside = blocks.stream.document_starts(start, start + self.seq_len) - start
            lengths += np.diff(inside, prepend=0, append=self.seq_len).tolist()
        return tuple(lengths)

    def _hold_out(self, source: TokenSource[Stream], share: float) -> tuple[Blocks, Blocks]:
        """The blocks of a source to train on, and the ones held out from its end."""
        stream, seq_len = source.stream, self.seq_len
        num_blocks = max(0, stream.num_tokens - 1) // (seq_len - 1)
        num_train = num_blocks - int(np.ceil(share * num_blocks))
        if num_train < 1:
            needed = 2 if share else 1  # one block to learn from, one held out
            largest = (stream.num_tokens - 1) // needed + 1
            advice = f"use seq_len of at most {largest} or " if largest >= 2 else ""
            what = "the text" if source.name == "text" else f"source {source.name!r}"
            raise ValueError(
                f"{what} has {stream.num_tokens} tokens, fewer than seq_len={seq_len} needs "
                f"({needed * (seq_len - 1) + 1}); {advice}give more text."
            )
        train = Blocks(source.name, stream, seq_len, 0, num_train)
        return train, Blocks(source.name, stream, seq_len, num_train, num_blocks)

    def _strata(self, blocks: Blocks, stop: int, threshold: int, factor: float) -> list[tuple[Blocks, float]]:
        """A source's long documents and its others, up to token `stop`, with their shares of the source."""
        if not isinstance(blocks.stream, ShardStream | DocumentStream):
            raise ValueError("long_documents needs prepared sources, which know where documents begin.")
        streams = split_by_length(blocks.stream, stop, threshold)
        shares = [streams[0].num_tokens * factor, float(streams[1].num_tokens)]
        parts = []
        for name, stream, share in zip((f"{blocks.name} (long)", blocks.name), streams, shares, strict=True):
            count = max(0, stream.num_tokens - 1) // (self.seq_len - 1)
            if count:  # too few for one sequence are left out
                parts.append((Blocks(name, stream, self.seq_len, 0, count), share / sum(shares)))
        return parts or [(blocks, 1.0)]


def _without_short(source: TokenSource[Stream], min_tokens: int) -> TokenSource[Stream]:
    """A source's documents of at least `min_tokens` tokens."""
    if not isinstance(source.stream, ShardStream):
        raise ValueError("min_tokens needs prepared sources, which know where documents begin.")
    stream = split_by_length(source.stream, source.stream.num_tokens, min_tokens)[0]
    if not stream.num_tokens:
        raise ValueError(
            f"source {source.name!r} has no document of min_tokens = {min_tokens} tokens; lower it, or leave the "
            "source out."
        )
    return TokenSource(source.name, source.weight, stream)
