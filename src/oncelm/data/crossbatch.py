"""Batches for crossbatch training: `parts` rows, one behind the other, hold consecutive parts of one document.

    sequence of parts (T - 1) + 1 tokens  ->  rows of T tokens, each starting with the last token of the one before

In memory layers a row then sees the rows before it: earlier parts of its own document (positives), and through
`cross_batch_range` parts of the document above it in the batch (negatives); see `oncelm.ops.crossbatch`. Sequences are
drawn by TokenDataset, with its mixture, shuffle and held-out part: a batch depends on (seed, step) alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from oncelm.data.batch import TrainBatch
from oncelm.data.dataset import TokenDataset


def sequence_tokens(seq_len: int, parts: int) -> int:
    """Tokens in a sequence that gives `parts` rows of `seq_len` tokens: every one but the first is a target once."""
    return parts * (seq_len - 1) + 1


class CrossbatchDataset:
    """The sequences of a TokenDataset, each cut into `parts` rows.

    What is held out stays whole: [b, parts (T - 1) + 1], for a model to read as it reads any text, window by window.

    Args:
        sequences: of `sequence_tokens(T, parts)` tokens. A sequence that a document ends in goes on with another:
            `min_tokens` keeps that rare.
        parts: k, rows of a sequence; `dataset_packing` of the model.
    """

    def __init__(self, sequences: TokenDataset, parts: int) -> None:
        if parts < 1 or (sequences.seq_len - 1) % parts or sequences.seq_len <= parts:
            raise ValueError(
                "parts must be at least 1, and sequences of parts * (T - 1) + 1 tokens for rows of T; got parts "
                f"{parts} and sequences of {sequences.seq_len}."
            )
        self.sequences, self.parts = sequences, parts
        self.seq_len = (sequences.seq_len - 1) // parts + 1

    def batch(self, step: int, count: int, rows: slice | None = None) -> TrainBatch:
        """The rows of one step, [B, T]: a pure function of (seed, step) for a given count.

        Args:
            count: rows of the whole step, over all ranks; a multiple of parts.
            rows: ascending; read these rows of the step only. None: all.
        """
        if count % self.parts:
            raise ValueError(f"a batch of {count} is not divisible by parts {self.parts}, the rows of a sequence.")
        first, stop, _ = (rows or slice(None)).indices(count)
        whole = slice(first // self.parts, -(-stop // self.parts))
        sequences = self.sequences.batch(step, count // self.parts, whole).tokens
        skipped = whole.start * self.parts
        tokens = sequences.unfold(1, self.seq_len, self.seq_len - 1).flatten(0, 1)[first - skipped : stop - skipped]
        return TrainBatch(tokens)

    def num_targets(self, step: int, count: int) -> int:
        """Tokens that are predicted in a step: all but the first of each row."""
        return count * (self.seq_len - 1)

    def describe(self, k: int) -> str:
        """Where row k of the run comes from, in words."""
        sequence, part = divmod(k, self.parts)
        return f"part {part + 1} of {self.parts} of {self.sequences.describe(sequence)}"

    def validation_batches(self, count: int) -> Iterator[TrainBatch]:
        """All held-out sequences, whole: [b, parts (T - 1) + 1] with about the tokens of `count` rows."""
        return self.sequences.validation_batches(max(1, count // self.parts))
