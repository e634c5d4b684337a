"""One process makes a tokenizer, and all that want it at the same time use that one."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import pytest

from oncelm.data import bpe
from oncelm.data.layout import find_corpus
from oncelm.data.tokenizers import load_tokenizer

TEXTS = [f"It was day {i} in April, and the clocks were striking.\n" for i in range(40)]


@pytest.fixture
def corpus(tmp_path, write_jsonl):
    write_jsonl(tmp_path / "text" / "a.jsonl", TEXTS)
    return find_corpus(tmp_path / "text")


@pytest.fixture
def trained(monkeypatch, tmp_path) -> Path:
    """A file with a line for each training, in any process; a training takes a while."""
    log = tmp_path / "trained"
    original = bpe.train_bpe

    def train(texts, vocab_size):
        with log.open("a") as file:
            file.write(f"{vocab_size}\n")
        time.sleep(0.5)
        return original(texts, vocab_size)

    monkeypatch.setattr(bpe, "train_bpe", train)
    return log


def test_it_is_made_once_and_anew_when_asked(tmp_path, corpus, trained) -> None:
    bpe.keep_bpe(tmp_path / "kept", corpus, 300)
    bpe.keep_bpe(tmp_path / "kept", corpus, 300)
    assert trained.read_text() == "300\n"
    bpe.make_bpe(tmp_path / "kept", corpus, 280)
    assert trained.read_text() == "300\n280\n"
    assert len(load_tokenizer(tmp_path / "kept")) == 280


def test_processes_that_want_it_at_once_make_one(tmp_path, corpus, trained) -> None:
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=bpe.keep_bpe, args=(tmp_path / "tokens" / "kept", corpus, 300)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert trained.read_text() == "300\n"
    assert len(load_tokenizer(tmp_path / "tokens" / "kept")) == 300


def test_a_damaged_one_is_named(tmp_path, corpus) -> None:
    bpe.keep_bpe(tmp_path / "kept", corpus, 300)
    file = tmp_path / "kept" / "tokenizer.json"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged; delete '.*kept' to have it made from the text"):
        bpe.keep_bpe(tmp_path / "kept", corpus, 300)
