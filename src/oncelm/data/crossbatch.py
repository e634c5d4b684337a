"""Batches for crossbatch training: `packing` rows, one behind the other, hold consecutive parts of one document.

    sequence of packing (T - 1) + 1 tokens  ->  rows of T tokens, each starting with the last token of the one before

In memory layers a row then sees the rows before it: earlier parts of its own document (positives), and through
`cross_batch_range` parts of the document above it in the batch (negatives); see `oncelm.ops.crossbatch`. Sequences are
drawn by TokenDataset, so mixture, shuffle and what is held out are its: a batch is a pure function of (seed, step).
"""

from __future__ import annotations

from collections.abc import Iterator

from oncelm.data.batch import TrainBatch
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

    def batch(self, step: int, count: int, rows: slice | None = None) -> TrainBatch:
        """The rows of one step, [B, T]: a pure function of (seed, step) for a given count.

        Args:
            count: rows of the whole step, over all ranks; a multiple of packing.
            rows: ascending; read these rows of the step only. None: all.
        """
        if count % self.packing:
            raise ValueError(f"a batch of {count} is not divisible by packing {self.packing} (rows a sequence).")
        first, stop, _ = (rows or slice(None)).indices(count)
        whole = slice(first // self.packing, -(-stop // self.packing))
        sequences = self.sequences.batch(step, count // self.packing, whole).tokens
        skipped = whole.start * self.packing
        tokens = sequences.unfold(1, self.seq_len, self.seq_len - 1).flatten(0, 1)[first - skipped : stop - skipped]
        return TrainBatch(tokens)

    def num_targets(self, step: int, count: int) -> int:
        """Tokens that are predicted in a step: all but the first of each row."""
        return count * (self.seq_len - 1)

    def describe(self, k: int) -> str:
        """Where row k of the run comes from, in words."""
        sequence, part = divmod(k, self.packing)
        return f"part {part + 1} of {self.packing} of {self.sequences.describe(sequence)}"

    def validation_batches(self, count: int) -> Iterator[TrainBatch]:
        """All held-out sequences, whole: [b, packing (T - 1) + 1] with about the tokens of `count` rows."""
        return self.sequences.validation_batches(max(1, count // self.packing))
