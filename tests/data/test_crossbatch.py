"""Rows of documents: consecutive parts side by side, drawn as TokenDataset draws, the same for the same step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.data.crossbatch import CrossbatchDataset, sequence_tokens
from oncelm.data.dataset import TokenDataset
from oncelm.data.layout import find_corpus
from oncelm.data.prepare import prepare
from oncelm.data.read_ahead import ReadAhead
from oncelm.data.tokens import open_tokens


def make_dataset(seq_len: int, parts: int, tokens: int = 4000, **options) -> CrossbatchDataset:
    """Tokens say where they stand."""
    sequences = TokenDataset(np.arange(tokens, dtype=np.uint32), sequence_tokens(seq_len, parts), **options)
    return CrossbatchDataset(sequences, parts)


@settings(deadline=None, max_examples=40)
@given(seq_len=st.integers(2, 9), parts=st.integers(1, 5), lanes=st.integers(1, 3), seed=st.integers(0, 3))
def test_the_parts_of_a_sequence_are_one_piece_of_text(seq_len, parts, lanes, seed) -> None:
    data = make_dataset(seq_len, parts, seed=seed)
    targets = Counter()
    for step in range(5):
        batch = data.batch(step, parts * lanes).tokens
        assert batch.shape == (parts * lanes, seq_len)
        assert batch.dtype == torch.int64
        for piece in batch.view(lanes, parts, seq_len):
            first = int(piece[0, 0])
            expected = first + np.arange(parts)[:, None] * (seq_len - 1) + np.arange(seq_len)
            assert piece.tolist() == expected.tolist()  # rows overlap by one token
        targets.update(batch[:, 1:].flatten().tolist())
    assert set(targets.values()) == {1}  # no target twice in the first epoch


def test_a_step_depends_on_its_number_alone_and_parts_of_it_are_parts() -> None:
    used, fresh = make_dataset(6, 2, seed=1), make_dataset(6, 2, seed=1)
    for step in (3, 0, 40, 7):
        used.batch(step, 4)
    whole = fresh.batch(11, 8).tokens
    assert torch.equal(used.batch(11, 8).tokens, whole)
    assert not torch.equal(make_dataset(6, 2, seed=2).batch(11, 8).tokens, whole)
    for rows in (slice(0, 4), slice(1, 4), slice(2, 3), slice(5, 8), slice(4)):
        assert torch.equal(used.batch(11, 8, rows).tokens, whole[rows])
    with ReadAhead(fresh) as ahead:
        assert torch.equal(ahead.batch(11, 8, slice(2, 6)).tokens, whole[2:6])
    assert fresh.num_targets(11, 8) == fresh.batch(11, 8).num_targets == 8 * 5
    first = int(whole[2, 0])
    assert fresh.describe(11 * 8 + 3) == f"part 2 of 2 of tokens {first:,} to {first + 11:,} of source 'text'"


def test_what_is_held_out_stays_whole() -> None:
    data = make_dataset(6, 2, tokens=501, validation_fraction=0.2)
    held_out = torch.cat([batch.tokens for batch in data.validation_batches(4)])
    assert [len(batch.tokens) for batch in data.validation_batches(4)] == [2] * 5
    assert held_out.shape == (10, 11)
    seen = {int(token) for step in range(30) for token in data.batch(step, 4).tokens[:, 1:].flatten()}
    assert not seen & set(held_out[:, 1:].flatten().tolist())
    assert [len(batch.tokens) for batch in data.validation_batches(1)] == [1] * 10  # fewer rows than a sequence has


def test_sources_have_their_weights_and_short_documents_are_left_out(tmp_path, write_corpus, byte_tokenizer) -> None:
    """Documents of a source are all of one letter; capitals are in documents that are too short."""
    texts = {"a": ["a" * 100, "A" * 20, "b" * 90], "c": ["c" * 500, "C" * 30]}
    corpus = write_corpus(tmp_path / "corpus", {name: (weight, texts[name]) for name, weight in (("a", 3), ("c", 1))})
    tokens = open_tokens(prepare(find_corpus(corpus), byte_tokenizer, tmp_path / "tokens"))
    sequences = TokenDataset(tokens.train, sequence_tokens(4, 3), validation_fraction=0.1, min_tokens=50)
    data = CrossbatchDataset(sequences, 3)
    batch = data.batch(0, 3 * 400).tokens
    shown = "".join(byte_tokenizer.decode(row, skip_special_tokens=True) for row in batch)
    assert shown.isalpha()
    assert shown.islower()
    from_c = ["c" in byte_tokenizer.decode(row) for row in batch[::3]]
    assert sum(from_c) / len(from_c) == pytest.approx(0.25, abs=0.01)
    held_out = "".join(byte_tokenizer.decode(row) for part in data.validation_batches(3) for row in part.tokens)
    assert "b" in held_out
    assert "c" in held_out
    assert "C" not in held_out


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="a batch of 3 is not divisible by parts 2"):
        make_dataset(5, 2).batch(0, 3)
    sequences = TokenDataset(np.arange(100, dtype=np.uint32), 10)
    for parts in (0, 2, 10):
        with pytest.raises(ValueError, match=f"got parts {parts} and sequences of 10"):
            CrossbatchDataset(sequences, parts)
