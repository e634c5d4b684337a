"""Training batches in CPU memory: all counting and cutting is done before a batch is sent to a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from oncelm.models.inputs import IGNORE_INDEX


@dataclass(frozen=True)
class TrainBatch:
    """Rows of T tokens, in the host's memory.

    Attributes:
        tokens: int64 [B, T].
        labels: int64 [B, T] beside them, IGNORE_INDEX for what is not learned, as each document's first token; None:
            all others are.
        lengths: tokens of each document in the rows, one row behind the other, where documents see themselves only; a
            row's end is a document's. None: rows are seen whole.
    """

    tokens: Tensor
    labels: Tensor | None = None
    lengths: tuple[int, ...] | None = None

    @property
    def num_targets(self) -> int:
        """How many tokens are predicted and learned."""
        if self.labels is not None:
            return int((self.labels != IGNORE_INDEX).sum())
        return self.tokens.numel() - len(self.tokens if self.lengths is None else self.lengths)

    @property
    def cu_seqlens(self) -> Tensor | None:
        """int32 [N + 1]: borders of the documents in `tokens.view(1, -1)`; None where rows are seen whole."""
        if self.lengths is None:
            return None
        return torch.tensor([*accumulate(self.lengths, initial=0)], dtype=torch.int32)

    def split(self, count: int) -> list[TrainBatch]:
        """Batches of `count` rows each, of which the last may have fewer."""
        return [self._rows(start, start + count) for start in range(0, len(self.tokens), count)]

    def _rows(self, start: int, stop: int) -> TrainBatch:
        lengths, labels = self.lengths, self.labels
        if lengths is not None:
            first, last = start * self.tokens.shape[1], stop * self.tokens.shape[1]
            ends = accumulate(lengths)
            lengths = tuple(length for length, end in zip(lengths, ends, strict=True) if first < end <= last)
        return TrainBatch(self.tokens[start:stop], None if labels is None else labels[start:stop], lengths)

    def pin_memory(self) -> TrainBatch:
        """In page-locked memory, from which a copy to a GPU does not wait."""
        return TrainBatch(
            self.tokens.pin_memory(), None if self.labels is None else self.labels.pin_memory(), self.lengths
        )


class TrainData(Protocol):
    """What a trainer asks of its data (`TokenDataset`, `CrossbatchDataset`, `ConversationDataset`)."""

    def batch(self, step: int, count: int, rows: slice | None = None) -> TrainBatch:
        """Those `rows` of a step's `count` (None: all), the same whatever was asked before."""

    def num_targets(self, step: int, count: int) -> int:
        """How many tokens are learned in all the rows of a step."""

    def validation_batches(self, count: int) -> Iterator[TrainBatch]:
        """What is held out, in batches of about `count` rows, always the same ones in the same order; possibly none."""

    def describe(self, k: int) -> str:
        """Where row k of the run comes from, in words (row r of step s of `count` rows is row s count + r)."""
