"""Batches for crossbatch training: k rows of a batch hold consecutive parts of one document.

A batch of B rows is B / k lanes. A lane is fed document after document; when one ends, the next of an endless shuffled
sequence follows it in the same lane. In each step a lane gives k rows of `seq_len` tokens, which overlap by one token,
so that every token is a target once. In memory layers row i of a lane then sees earlier rows of its own document
(positives) and, through `cross_batch_range`, rows of the lane before it (negatives): `oncelm.ops.crossbatch`.

A batch is computed from its step number, never from what was drawn before it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from oncelm.data.tokens import ShardStream


def documents_of(stream: ShardStream) -> list[np.ndarray]:
    """The documents of prepared tokens (`open_tokens(folder).train[0].stream`), mapped from their files."""
    documents = []
    for shard in range(len(stream.shards)):
        start = int(stream.bounds[shard])
        for end in stream.document_ends(shard) + stream.bounds[shard]:
            documents.append(stream.read(start, int(end)))
            start = int(end)
    return documents


@dataclass
class _Lane:
    documents: list[int] = field(default_factory=list)
    borders: list[int] = field(default_factory=lambda: [0])  # where each document starts in the lane, and the end


class DocumentBatches:
    """Documents in order, `packing` rows at a time (LongLLaMA's k-packing pipeline).

    Args:
        documents: token arrays, one a document, with whatever marks their start and end.
        seq_len: tokens in a row, at least 2.
        packing: k, rows that one document fills in each batch; `dataset_packing` of the model.
        seed: of the shuffles.
        min_tokens: shorter documents are left out.
        held_out: documents at the end of the list that are only for validation.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        seq_len: int,
        packing: int,
        *,
        seed: int = 0,
        min_tokens: int = 1,
        held_out: int = 0,
    ) -> None:
        if seq_len < 2:
            raise ValueError(f"seq_len must be at least 2 (one token and the next), got {seq_len}.")
        if packing < 1:
            raise ValueError(f"packing must be at least 1, got {packing}.")
        border = len(documents) - held_out
        if not 0 <= held_out <= len(documents):
            raise ValueError(f"held_out must be from 0 to the {len(documents)} documents there are, got {held_out}.")
        self.documents = [document for document in documents[:border] if len(document) >= max(1, min_tokens)]
        self.held_out = [document for document in documents[border:] if len(document)]
        if not self.documents:
            raise ValueError(
                f"none of {border} documents to train on has min_tokens = {min_tokens} tokens; give longer ones."
            )
        self.seq_len, self.packing, self.seed = seq_len, packing, seed
        self._lanes: list[_Lane] = []
        self._drawn = 0  # documents given to lanes so far
        self._orders: dict[int, np.ndarray] = {}

    def batch(self, step: int, batch_size: int, rows: slice | None = None) -> torch.Tensor:
        """int64 [B, T]: a pure function of (seed, step) for a given batch size.

        Args:
            batch_size: of the whole step, over all ranks; a multiple of packing, as each rank's share must be.
            rows: read these rows of the batch only; None: all.
        """
        if batch_size % self.packing:
            raise ValueError(f"a batch of {batch_size} is not divisible by packing {self.packing} (rows a document).")
        if len(self._lanes) != batch_size // self.packing:
            self._lanes, self._drawn = [_Lane() for _ in range(batch_size // self.packing)], 0
        new = self.packing * (self.seq_len - 1)  # tokens that a lane gives in a step
        self._extend((step + 1) * new + 1)
        first, stop, _ = (rows or slice(None)).indices(batch_size)
        first_lane = first // self.packing
        starts = np.arange(self.packing)[:, None] * (self.seq_len - 1)
        found = [
            self._read(lane, step * new, (step + 1) * new + 1)[starts + np.arange(self.seq_len)]
            for lane in self._lanes[first_lane : -(-stop // self.packing)]
        ]
        skipped = first_lane * self.packing
        return torch.from_numpy(np.concatenate(found)[first - skipped : stop - skipped].astype(np.int64))

    def validation_batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """The held-out documents' whole rows, int64 [B, T], document by document; the last batch may be smaller."""
        rows = [
            document[start : start + self.seq_len]
            for document in self.held_out
            for start in range(0, len(document) - self.seq_len + 1, self.seq_len - 1)
        ]
        for first in range(0, len(rows), batch_size):
            yield torch.from_numpy(np.stack(rows[first : first + batch_size]).astype(np.int64))

    def _extend(self, tokens: int) -> None:
        """Feed lanes until each has `tokens`: always the one that would run dry first."""
        heap = [(lane.borders[-1], number) for number, lane in enumerate(self._lanes)]
        heapq.heapify(heap)
        while heap[0][0] < tokens:
            length, number = heap[0]
            epoch, place = divmod(self._drawn, len(self.documents))
            document = int(self._order(epoch)[place])
            self._drawn += 1
            length += len(self.documents[document])
            self._lanes[number].documents.append(document)
            self._lanes[number].borders.append(length)
            heapq.heapreplace(heap, (length, number))

    def _order(self, epoch: int) -> np.ndarray:
        """The documents in the order in which an epoch draws them."""
        if epoch not in self._orders:
            self._orders = {epoch: np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))}
        return self._orders[epoch]

    def _read(self, lane: _Lane, first: int, stop: int) -> np.ndarray:
        """Tokens first..stop-1 of a lane."""
        parts = []
        number = int(np.searchsorted(lane.borders, first, side="right")) - 1
        while first < stop:
            start = lane.borders[number]
            part = self.documents[lane.documents[number]][first - start : stop - start]
            parts.append(part)
            first += len(part)
            number += 1
        return np.concatenate(parts)
