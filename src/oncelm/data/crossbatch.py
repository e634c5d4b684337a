"""Batches for crossbatch training: `packing` rows, one behind the other, hold consecutive parts of one document.

    sequence of packing (T - 1) + 1 tokens  ->  rows of T tokens, each starting with the last token of the one before

In memory layers a row then sees the rows before it: earlier parts of its own document (positives), and through
`cross_batch_range` parts of the document above it in the batch (negatives); see `oncelm.ops.crossbatch`. Sequences are
drawn by TokenDataset, so mixture, shuffle and what is held out are its: a batch is a pure function of (seed, step).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from oncelm.data.dataset import TokenDataset


def sequence_tokens(seq_len: int, packing: int) -> int:
    """Tokens in a sequence that gives `packing` rows of `seq_len` tokens: every one but the first is a target once."""
    return packing * (seq_len - 1) + 1


class CrossbatchDataset:
    """The sequences of a TokenDataset, each cut into `packing` rows.

    What is held out stays whole: [b, packing (T - 1) + 1], for a model to read as it reads any text, window by window.

    Args:
        sequences: of `sequence_tokens(T, packing)` tokens. A sequence that a document ends in goes on with another:
            `min_tokens` keeps that rare.
        packing: k, rows of a sequence; `dataset_packing` of the model.
    """

    def __init__(self, sequences: TokenDataset, packing: int) -> None:
        if packing < 1 or (sequences.seq_len - 1) % packing or sequences.seq_len <= packing:
            raise ValueError(
                f"packing must be at least 1, and sequences of packing * (T - 1) + 1 tokens for rows of T; got packing "
                f"{packing} and sequences of {sequences.seq_len}."
            )
        self.sequences, self.packing = sequences, packing
        self.seq_len = (sequences.seq_len - 1) // packing + 1

    def batch(self, step: int, batch_size: int, rows: slice | None = None) -> torch.Tensor:
        """The rows of one step, int64 [B, T]: a pure function of (seed, step) for a given batch size.

        Args:
            batch_size: of the whole step, over all ranks; a multiple of packing.
            rows: ascending; read these rows of the batch only. None: all.
        """
        if batch_size % self.packing:
            raise ValueError(f"a batch of {batch_size} is not divisible by packing {self.packing} (rows a sequence).")
        first, stop, _ = (rows or slice(None)).indices(batch_size)
        whole = slice(first // self.packing, -(-stop // self.packing))
        sequences = self.sequences.batch(step, batch_size // self.packing, whole)
        skipped = whole.start * self.packing
        return sequences.unfold(1, self.seq_len, self.seq_len - 1).flatten(0, 1)[first - skipped : stop - skipped]

    def describe(self, k: int) -> str:
        """Where row k of the run comes from, in words."""
        sequence, part = divmod(k, self.packing)
        return f"part {part + 1} of {self.packing} of {self.sequences.describe(sequence)}"

    def validation_batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """All held-out sequences, whole: int64 [b, packing (T - 1) + 1] with about the tokens of `batch_size` rows."""
        return self.sequences.validation_batches(max(1, batch_size // self.packing))
