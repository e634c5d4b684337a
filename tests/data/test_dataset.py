"""Text to tokens to batches: nothing lost, nothing repeated, and a batch depends on (seed, step) alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.data.dataset import TokenDataset, read_documents, read_text, split_text, text_files, tokenize
from oncelm.data.tokenizers import load_tokenizer, train_bpe


def make_dataset(num_tokens: int = 500, seq_len: int = 8, **options) -> TokenDataset:
    return TokenDataset(np.arange(num_tokens, dtype=np.uint32), seq_len, **options)


def starts(batch: torch.Tensor) -> list[int]:
    """Where each row begins in a stream whose tokens are their own positions."""
    return batch[:, 0].tolist()


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    used, fresh = make_dataset(seed=3), make_dataset(seed=3)
    for step in (0, 40, 7, 8, 7, 200):  # any order, epochs apart
        used.batch(step, 4)
    assert torch.equal(used.batch(11, 4), fresh.batch(11, 4))
    assert not torch.equal(make_dataset(seed=4).batch(11, 4), fresh.batch(11, 4))


def test_the_batch_size_only_cuts_the_same_sequence() -> None:
    dataset = make_dataset()
    assert torch.equal(dataset.batch(5, 6), torch.cat([dataset.batch(15 + i, 2) for i in range(3)]))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 120), st.integers(1, 7), st.integers(0, 3), st.floats(0, 0.5))
def test_an_epoch_sees_every_block_once(
    seq_len: int, more_tokens: int, batch_size: int, epoch: int, validation_share: float
) -> None:
    dataset = make_dataset(2 * seq_len + more_tokens, seq_len, validation_share=validation_share)
    num_blocks = dataset.num_train_blocks
    first, last = epoch * num_blocks // batch_size, -(-(epoch + 1) * num_blocks // batch_size)
    seen = [start for step in range(first, last) for start in starts(dataset.batch(step, batch_size))]
    offset = epoch * num_blocks - first * batch_size
    assert sorted(seen[offset : offset + num_blocks]) == [i * (seq_len - 1) for i in range(num_blocks)]


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 12), st.integers(0, 120), st.floats(0, 0.5))
def test_every_token_is_a_target_once_in_training_or_validation(
    seq_len: int, more_tokens: int, validation_share: float
) -> None:
    dataset = make_dataset(2 * seq_len + more_tokens, seq_len, validation_share=validation_share)
    train = dataset.batch(0, dataset.num_train_blocks)
    validation = [row for batch in dataset.validation_batches(3) for row in batch]
    targets = [token for row in [*train, *validation] for token in row[1:].tolist()]
    assert sorted(targets) == list(range(1, len(targets) + 1))
    assert len(dataset.tokens) - 1 - len(targets) < seq_len - 1  # what fills no block
    assert all(row[1] > train.max() for row in validation)  # the end of the stream, in its order
    assert [int(row[0]) for row in validation] == sorted(int(row[0]) for row in validation)


def test_epochs_are_shuffled_differently() -> None:
    dataset = make_dataset(validation_share=0)
    first, second = (starts(dataset.batch(epoch, dataset.num_train_blocks)) for epoch in range(2))
    assert first != second
    assert first != sorted(first)


def test_a_batch_is_int64_rows_of_consecutive_tokens() -> None:
    batch = make_dataset().batch(0, 3)
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
        make_dataset(num_tokens, validation_share=share)
    if "at most" in message:
        fits = int(message.split("at most ")[1].split()[0])
        make_dataset(num_tokens, fits, validation_share=share)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="seq_len must be at least 2"):
        make_dataset(seq_len=1)
    with pytest.raises(ValueError, match="validation_share must be"):
        make_dataset(validation_share=1.0)


def test_a_folder_is_read_in_sorted_order_with_eos_after_each_document(tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in {"b.txt": "B", "sub/a.txt": "S", "a.txt": "A", "note.md": "no"}.items():
        (tmp_path / name).write_text(text)
    tokenizer = load_tokenizer("bytes")
    assert list(read_documents(tmp_path)) == ["A", "B", "S"]
    ids = tokenize(tmp_path, tokenizer)
    assert ids.dtype == np.uint32
    eos = tokenizer.eos_token_id
    expected = [token for text in "ABS" for token in [*tokenizer(text)["input_ids"], eos]]
    assert ids.tolist() == expected


def test_text_is_read_as_python_reads_it(tmp_path) -> None:
    file = tmp_path / "windows.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    assert read_text(file) == "one\ntwo\nthree\n"


def test_pieces_join_to_the_text_and_tokenize_to_the_same_tokens(tmp_path) -> None:
    text = "".join(f"line {i}, it's\n\n  {i * i}\n\t\nend.\n" for i in range(200)) + "no break at the end"
    pieces = list(split_text(text, size=50))
    assert "".join(pieces) == text
    assert len(pieces) > 50
    for tokenizer in (load_tokenizer("bytes"), train_bpe([text], 300)):
        whole = tokenizer(text)["input_ids"]
        assert [token for piece in pieces for token in tokenizer(piece)["input_ids"]] == whole


def test_special_tokens_spelled_in_a_text_stay_text(tmp_path) -> None:
    tokenizer = load_tokenizer("bytes")
    (tmp_path / "a.txt").write_text(tokenizer.eos_token)
    ids = tokenize(tmp_path, tokenizer)
    assert (ids == tokenizer.eos_token_id).sum() == 1


def test_bad_files_are_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"nowhere' does not exist"):
        text_files(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no \.txt file"):
        text_files(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text: byte 0xe9 at offset 3"):
        read_text(tmp_path / "latin.txt")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        list(read_documents(tmp_path))


def test_a_tokenizer_without_eos_is_refused(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("text")
    tokenizer = load_tokenizer("bytes")
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        tokenize(tmp_path, tokenizer)
