"""`oncelm data`, and `oncelm train` on each kind of data that it takes."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from oncelm.cli import main
from oncelm.data.bpe import corpus_tokenizer
from oncelm.data.layout import find_corpus
from oncelm.data.tokenizers import load_tokenizer
from oncelm.data.tokens import open_tokens

QUICK = ("--steps", "2", "--set", "seq_len=16", "batch_size=2", "warmup_steps=1")
TEXTS = [f"It was day {i} in April, and the clocks were striking.\n" for i in range(40)]


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    (root / "json").mkdir(parents=True)
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (root / "a.jsonl").write_text("".join(lines))
    (root / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
    (root / "c.jsonl").write_text("".join(lines[:9]))
    listing = [{"name": "first", "weight": 3}, {"name": "second", "count": 1}]
    (root / "json" / "train.json").write_text(json.dumps(listing))
    (root / "json" / "first.json").write_text('["a.jsonl"]')
    (root / "json" / "second.json").write_text('["b.jsonl.gz"]')
    (root / "json" / "valid.json").write_text('[{"name": "third", "weight": 1}]')
    (root / "json" / "third.json").write_text('["c.jsonl"]')
    return root


def test_prepare_info_sample_and_train(corpus, tmp_path, capsys) -> None:
    tokens = tmp_path / "tokens"
    assert main(["data", "info", str(corpus)]) == 0
    shown = capsys.readouterr().out
    assert "75.0%" in shown
    assert f"next: oncelm data prepare {corpus}" in shown
    assert main(["data", "prepare", str(corpus), "--tokenizer", "bpe:300", "--out", str(tokens)]) == 0
    assert f"Next: oncelm train {tokens}" in capsys.readouterr().out
    assert main(["data", "info", str(tokens)]) == 0
    shown = capsys.readouterr().out
    assert "first" in shown
    assert "measure" in shown
    assert main(["data", "sample", str(tokens), "--seq-len", "32", "--step", "5", "--count", "2"]) == 0
    shown = capsys.readouterr().out
    assert "--- step 5, row 1: " in shown
    assert "in April" in shown
    out = tmp_path / "run"
    assert main(["train", str(tokens), "--out", str(out), *QUICK, "document_masking=true"]) == 0
    assert "validation loss" in capsys.readouterr().out
    assert json.loads((out / "model" / "config.json").read_text())["vocab_size"] <= 300


def test_train_takes_the_corpus_itself_and_resumes(corpus, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    command = ["train", str(corpus), "--out", str(out), *QUICK, "long_documents=60", "long_factor=2"]
    assert main([*command, "--dry-run"]) == 0
    assert "2 source(s), 3 file(s)" in capsys.readouterr().out
    assert not (corpus / ".oncelm").exists()
    assert main(command) == 0
    (folder,) = (corpus / ".oncelm").iterdir()
    assert [source.name for source in open_tokens(folder).valid] == ["third"]
    assert main(["data", "info", str(corpus)]) == 0
    assert "in documents of at least" in capsys.readouterr().out
    assert main(["train", "--out", str(out), "--resume", "--steps", "3"]) == 0
    assert "3 steps" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "parquet"])
def test_train_takes_a_folder_of_every_kind(kind, tmp_path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    file = folder / f"a.{kind}"
    if kind == "txt":
        file.write_text("".join(TEXTS))
    elif kind == "parquet":
        parquet.write_table(pyarrow.table({"text": TEXTS}), file)
    else:
        file.write_bytes(gzip.compress(lines.encode()) if kind.endswith("gz") else lines.encode())
    assert main(["train", str(folder), "--out", str(tmp_path / "run"), *QUICK]) == 0
    stream = open_tokens(next((folder / ".oncelm").iterdir())).train[0].stream
    text = bytes((stream.read(0, stream.num_tokens) - 4).astype(np.uint8))  # ids of bytes are shifted by 4
    assert text.replace(bytes([254]), b"") == "".join(TEXTS).encode()


def test_malformed_lines_are_shown_and_strict_stops(corpus, tmp_path, capsys, caplog) -> None:
    with (corpus / "a.jsonl").open("a") as file:
        file.write("garbage\n")
    assert main(["data", "prepare", str(corpus)]) == 0
    error = capsys.readouterr().err
    assert "left out 1 malformed lines or files" in error
    assert f"{corpus / 'a.jsonl'}:41: not JSON" in error
    assert main(["data", "prepare", str(corpus), "--strict"]) == 2
    assert capsys.readouterr().err.startswith(f"oncelm: error: {corpus / 'a.jsonl'}:41: not JSON")
    assert main(["train", str(corpus), "--out", str(tmp_path / "run"), *QUICK]) == 0
    assert "left out 1 malformed lines, the first: " in caplog.text


def test_what_is_left_out_is_named_by_every_verb(tmp_path, capsys, caplog) -> None:
    data = tmp_path / "data"
    (tmp_path / "disk2").mkdir()
    data.mkdir()
    (data / "a.jsonl").write_text('{"text": "plain"}\n{"text": "one", "score": NaN}\n')
    (tmp_path / "disk2" / "b.jsonl").write_text('{"text": "linked"}\n' * 20)
    (data / "more").symlink_to("../disk2")
    (data / "notes.md").touch()
    named = f"left out of {data}: 1 with the suffix .md (notes.md)\n"
    for action in ("prepare", "info"):
        assert main(["data", action, str(data)]) == 0
        shown = capsys.readouterr()
        assert shown.err == named
    assert "150" in shown.out  # 5 + 3 + 20 * 6 bytes, and an end behind each of 22
    assert main(["train", str(data), "--out", str(tmp_path / "run"), *QUICK]) == 0
    assert named.strip() in caplog.text


def test_unchanged_text_keeps_its_own_tokenizer_and_tokens(corpus, capsys) -> None:
    command = ["data", "prepare", str(corpus), "--tokenizer", "bpe:300", "--prune"]
    assert main(command) == 0
    folders = sorted((corpus / ".oncelm").iterdir())
    assert main(command) == 0
    assert sorted((corpus / ".oncelm").iterdir()) == folders
    assert "freed 0.0 KiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["data", "prepare", "{root}/nowhere"], "does not exist"),
        (["data", "mend", "{root}"], "invalid choice: 'mend'"),
        (["data", "sample", "{root}", "--count", "0"], "--count must be a whole number of at least 1, got 0"),
        (["data", "sample", "{root}", "--step", "-3"], "--step must be a whole number of at least 0, got -3"),
        (["data", "prepare", "{root}", "--workers", "0"], "--workers must be a whole number of at least 1, got 0"),
        (["data", "prepare", "{root}", "--tokenizer", "bpe:x"], "after 'bpe:' comes the vocabulary size"),
        (["data", "prepare", "{root}", "--tokenizer", "bpe:99999999999"], "at most 1,048,576, got 99999999999"),
        (["data", "sample", "{root}", "--seq-len", "99999"], "use seq_len of at most"),
        (["train", "{root}", "--out", "{root}/run", "--set", "long_factor=-1"], "long_factor must be"),
    ],
)
def test_mistakes_are_one_line_and_status_2(corpus, capsys, command, message) -> None:
    assert main([part.format(root=corpus) for part in command]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_tokens_of_another_tokenizer_are_refused(corpus, tmp_path, capsys) -> None:
    tokens = str(tmp_path / "tokens")
    assert main(["data", "prepare", str(corpus), "--out", tokens]) == 0
    assert main(["train", tokens, "--out", str(tmp_path / "run"), "--tokenizer", "bytes", *QUICK]) == 0
    other = [*QUICK, "model_overrides.vocab_size=90"]
    assert main(["train", tokens, "--out", str(tmp_path / "other"), *other]) == 2
    assert "knows 90 tokens only" in capsys.readouterr().err
    assert main(["data", "prepare", str(corpus), "--tokenizer", "bpe:300"]) == 0
    made = str(corpus / ".oncelm" / "bpe-300")
    assert main(["train", tokens, "--out", str(tmp_path / "other"), "--tokenizer", made, *QUICK]) == 2
    assert "was prepared with another tokenizer" in capsys.readouterr().err
    assert main(["data", "prepare", tokens]) == 2
    assert "holds tokens already" in capsys.readouterr().err


def test_help_teaches(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["data", "--help"])
    assert "oncelm data prepare corpus --tokenizer cl100k_base" in capsys.readouterr().out


@pytest.mark.slow
def test_two_first_preparations_make_one_tokenizer(corpus, tmp_path) -> None:
    command = [sys.executable, "-m", "oncelm", "data", "prepare", str(corpus), "--tokenizer", "bpe:300"]
    command += ["--out", str(tmp_path / "tokens")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ended = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert ended[0][0] == ended[1][0]
    assert main(["data", "check", str(tmp_path / "tokens")]) == 0


def test_who_comes_second_uses_the_tokenizer_that_was_made_meanwhile(corpus, tmp_path, monkeypatch) -> None:
    """The other process is done between the look whether there is one and this one's turn."""
    kept = tmp_path / "tokens" / "bpe-300"

    @contextmanager
    def turn_behind_another(folder: Path) -> Iterator[None]:
        load_tokenizer("bytes").save_pretrained(kept)
        yield

    monkeypatch.setattr("oncelm.data.bpe.turn", turn_behind_another)
    assert len(corpus_tokenizer("bpe:300", find_corpus(corpus), tmp_path / "tokens")) == 260
