"""Tokens to batches: nothing lost, nothing repeated, and a batch depends on (seed, step) alone."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.data.dataset import TokenDataset
from oncelm.data.layout import find_corpus
from oncelm.data.prepare import prepare
from oncelm.data.tokens import ShardStream, open_tokens
from oncelm.models import build_model


def make_dataset(num_tokens: int = 500, seq_len: int = 8, **options) -> TokenDataset:
    return TokenDataset(np.arange(num_tokens, dtype=np.uint32), seq_len, **options)


def starts(batch: torch.Tensor) -> list[int]:
    """Where each row begins in a stream whose tokens are their own positions."""
    return batch[:, 0].tolist()


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    used, fresh = make_dataset(seed=3), make_dataset(seed=3)
    for step in (0, 40, 7, 8, 7, 200):  # any order, epochs apart
        used.batch(step, 4)
    assert torch.equal(used.batch(11, 4).tokens, fresh.batch(11, 4).tokens)
    assert not torch.equal(make_dataset(seed=4).batch(11, 4).tokens, fresh.batch(11, 4).tokens)


def test_the_batch_size_only_cuts_the_same_sequence() -> None:
    dataset = make_dataset()
    parts = [dataset.batch(15 + i, 2).tokens for i in range(3)]
    assert torch.equal(dataset.batch(5, 6).tokens, torch.cat(parts))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 120), st.integers(1, 7), st.integers(0, 3), st.floats(0, 0.5))
def test_an_epoch_sees_every_block_once(
    seq_len: int, more_tokens: int, batch_size: int, epoch: int, validation_fraction: float
) -> None:
    dataset = make_dataset(2 * seq_len + more_tokens, seq_len, validation_fraction=validation_fraction)
    num_blocks = dataset.num_train_blocks
    first, last = epoch * num_blocks // batch_size, -(-(epoch + 1) * num_blocks // batch_size)
    seen = [start for step in range(first, last) for start in starts(dataset.batch(step, batch_size).tokens)]
    offset = epoch * num_blocks - first * batch_size
    assert sorted(seen[offset : offset + num_blocks]) == [i * (seq_len - 1) for i in range(num_blocks)]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 120), st.floats(0, 0.5))
def test_every_token_is_a_target_once_in_training_or_validation(
    seq_len: int, more_tokens: int, validation_fraction: float
) -> None:
    dataset = make_dataset(2 * seq_len + more_tokens, seq_len, validation_fraction=validation_fraction)
    train = dataset.batch(0, dataset.num_train_blocks).tokens
    validation = [row for batch in dataset.validation_batches(3) for row in batch.tokens]
    targets = [token for row in [*train, *validation] for token in row[1:].tolist()]
    assert sorted(targets) == list(range(1, len(targets) + 1))
    assert 2 * seq_len + more_tokens - 1 - len(targets) < seq_len - 1  # what fills no block
    assert all(row[1] > train.max() for row in validation)  # the end of the stream


def test_epochs_are_shuffled_differently() -> None:
    dataset = make_dataset(validation_fraction=0)
    first, second = (starts(dataset.batch(epoch, dataset.num_train_blocks).tokens) for epoch in range(2))
    assert first != second
    assert first != sorted(first)


def test_a_batch_is_int64_rows_of_consecutive_tokens() -> None:
    batch = make_dataset().batch(0, 3).tokens
    assert batch.shape == (3, 8)
    assert batch.dtype == torch.int64
    assert (batch.diff() == 1).all()


@pytest.mark.parametrize(
    ("num_tokens", "share", "message"),
    [
        (10, 0.05, r"10 tokens.*seq_len=8 needs \(15\); use seq_len of at most 5 or give more text"),
        (7, 0.0, r"7 tokens.*seq_len=8 needs \(8\); use seq_len of at most 7 or"),
        (1, 0.0, r"1 tokens.*needs \(8\); give more text"),
        (0, 0.0, r"0 tokens.*needs \(8\); give more text"),
    ],
)
def test_too_little_text_says_what_would_fit(num_tokens: int, share: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_dataset(num_tokens, validation_fraction=share)
    if "at most" in message:
        fits = int(message.split("at most ")[1].split()[0])
        make_dataset(num_tokens, fits, validation_fraction=share)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="seq_len must be at least 2"):
        make_dataset(seq_len=1)
    with pytest.raises(ValueError, match="validation_fraction must be"):
        make_dataset(validation_fraction=1.0)


# -- several sources, prepared ----------------------------------------------------------------------------------------


@pytest.fixture
def tokens(tmp_path, write_corpus, byte_tokenizer):
    """Sources a, b and c, weighted 5, 3 and 2: a has short documents, b a few long ones, c both."""
    sources = {
        "a": (5, [f"a{i} " * (i % 9) + "." for i in range(150)]),
        "b": (3, [f"b{i} " * 100 for i in range(4)]),
        "c": (2, [f"c{i} " * (150 if i % 10 == 0 else 3) for i in range(60)]),
    }
    valid = {"d": (1, [f"d{i} " * 20 for i in range(10)]), "e": (1, ["e " * 300])}
    return open_tokens(prepare(find_corpus(write_corpus(tmp_path / "corpus", sources, valid)), byte_tokenizer))


def source_names(dataset: TokenDataset, rows: range) -> list[str]:
    return [dataset.locate(k)[0].name for k in rows]


def test_sources_are_mixed_by_weight_and_seen_once_an_epoch_each(tokens) -> None:
    dataset = TokenDataset(tokens.train, 32, seed=1, validation_fraction=0.1)
    counts = Counter(source_names(dataset, range(7, 1007)))
    assert {name: round(count / 100) for name, count in counts.items()} == {"a": 5, "b": 3, "c": 2}
    drawn: dict[str, list[int]] = {}
    for k in range(3000):
        blocks, block = dataset.locate(k)
        drawn.setdefault(blocks.name, []).append(block)
        size = len(blocks)
        if len(drawn[blocks.name]) % size == 0:
            assert sorted(drawn[blocks.name][-size:]) == list(range(size))


def test_rows_of_ranks_are_the_rows_of_the_global_batch(tokens) -> None:
    dataset = TokenDataset(tokens.train, 32, seed=1)
    whole = dataset.batch(11, 12).tokens
    for ranks in (1, 2, 3, 4):
        cut = [slice(r * 12 // ranks, (r + 1) * 12 // ranks) for r in range(ranks)]
        assert torch.equal(torch.cat([dataset.batch(11, 12, rows).tokens for rows in cut]), whole)
        dealt = [dataset.batch(11, 12, slice(r, None, ranks)).tokens for r in range(ranks)]
        assert torch.equal(torch.stack(dealt, dim=1).view(12, -1), whole)


def test_a_rank_reads_its_own_rows_only(tokens, monkeypatch) -> None:
    dataset = TokenDataset(tokens.train, 32, seed=1)
    read = []
    original = ShardStream.read
    monkeypatch.setattr(ShardStream, "read", lambda self, *span: read.append(span) or original(self, *span))
    dataset.batch(3, 64, slice(8, 12))
    assert len(read) == 4


def test_borders_are_the_rows_and_the_documents(tokens, byte_tokenizer) -> None:
    dataset = TokenDataset(tokens.train, 32, seed=1, document_masking=True)
    assert dataset.num_targets(4, 8) == dataset.batch(4, 8).num_targets
    for rows in (None, slice(2, 5)):
        batch = dataset.batch(4, 8, rows)
        borders = batch.cu_seqlens
        assert borders.dtype == torch.int32
        flat = batch.tokens.flatten()
        after_eos = torch.nonzero(flat == byte_tokenizer.eos_token_id).flatten() + 1
        rows_start = torch.arange(0, flat.numel() + 1, 32)
        assert borders.tolist() == sorted({*after_eos.tolist(), *rows_start.tolist()})


def test_with_document_masking_the_model_sees_each_document_alone(tokens) -> None:
    model = build_model("yoco-tiny", vocab_size=260).eval()
    batch = TokenDataset(tokens.train, 32, seed=1, document_masking=True).batch(0, 3)
    with torch.no_grad():
        packed = model(batch.tokens.view(1, -1), cu_seqlens=batch.cu_seqlens, use_cache=False).logits[0]
        alone = [model(ids[None], use_cache=False).logits[0] for ids in batch.tokens.flatten().split(batch.lengths)]
    torch.testing.assert_close(packed, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_held_out_sources_replace_the_share_and_their_order_is_mixed(tokens) -> None:
    dataset = TokenDataset(tokens.train, 32, validation=tokens.valid, validation_fraction=0.5, document_masking=True)
    assert dataset.num_train_blocks == sum((s.stream.num_tokens - 1) // 31 for s in tokens.train)
    assert dataset.num_validation_blocks == sum((s.stream.num_tokens - 1) // 31 for s in tokens.valid)
    batches = list(dataset.validation_batches(4))
    pairs = zip(batches, dataset.validation_batches(4), strict=True)
    assert all(torch.equal(one.tokens, other.tokens) for one, other in pairs)
    rows = {tuple(row.tolist()) for batch in batches for row in batch.tokens}
    expected = set()
    for source in tokens.valid:
        for i in range((source.stream.num_tokens - 1) // 31):
            expected.add(tuple(source.stream.read(31 * i, 31 * i + 32).tolist()))
    assert rows == expected
    first = batches[0].tokens[:, 1:].flatten().tolist()
    assert {ord("d") + 4, ord("e") + 4} <= set(first)  # both sources
    assert sum(batches[1].lengths) == batches[1].tokens.numel()


def test_long_documents_are_seen_more_often_by_the_factor(tokens) -> None:
    plain = TokenDataset(tokens.train, 32, validation_fraction=0)
    dataset = TokenDataset(tokens.train, 32, validation_fraction=0, long_documents=300, long_factor=3.0)
    rows = range(20_000)
    counts = Counter(source_names(dataset, rows))
    shares = Counter(source_names(plain, rows))
    for name, stream in ((s.name, s.stream) for s in tokens.train):
        assert abs(counts[name] + counts[f"{name} (long)"] - shares[name]) < 4  # the sources' shares stay
        ends = np.concatenate([stream.document_ends(i) for i in range(len(stream.shards))])
        lengths = np.diff(ends, prepend=0)
        long, short = int(lengths[lengths >= 300].sum()), int(lengths[lengths < 300].sum())
        if long and short:
            assert counts[f"{name} (long)"] / counts[name] == pytest.approx(3 * long / short, rel=0.02)
    assert counts["a (long)"] == counts["b"] == 0
    for k in range(50):
        blocks, block = dataset.locate(k)
        row, starts = blocks.read(block)
        assert len(row) == 32
        if blocks.name == "b (long)":
            assert len(starts) <= 1


def test_long_documents_need_documents() -> None:
    with pytest.raises(ValueError, match="needs prepared sources"):
        make_dataset(long_documents=10, long_factor=2.0)
    with pytest.raises(ValueError, match="long_factor must be above 0"):
        make_dataset(long_documents=10, long_factor=0.0)


def test_short_documents_are_left_out(tokens) -> None:
    dataset = TokenDataset(tokens.train[1:], 32, min_tokens=300)
    plain = TokenDataset(tokens.train[1:], 32)
    assert dataset.num_train_blocks < plain.num_train_blocks
    for stream in (blocks.stream for blocks in dataset._train + dataset._validation):
        starts = np.concatenate([[0], stream.document_starts(0, stream.num_tokens), [stream.num_tokens]])
        assert np.diff(starts).min() >= 300
    longer = TokenDataset(tokens.train[1:], 32, min_tokens=300, long_documents=600, long_factor=2.0)
    names = set(source_names(longer, range(500)))
    assert names <= {name + kind for name in ("b", "c") for kind in ("", " (long)")}
    with pytest.raises(ValueError, match="source 'a' has no document of min_tokens = 100000 tokens"):
        TokenDataset(tokens.train, 32, min_tokens=100_000)
    with pytest.raises(ValueError, match="min_tokens needs prepared sources"):
        make_dataset(min_tokens=10)


def test_a_source_too_small_for_one_sequence_is_named(tokens) -> None:
    with pytest.raises(ValueError, match=r"source 'a' has \d+ tokens, fewer than seq_len=3000 needs"):
        TokenDataset(tokens.train, 3000)
