"""A look at everything in a folder of tokens: every flipped bit is found, and made good by preparing again."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest

from oncelm.cli import main
from oncelm.data import shards as shards_module
from oncelm.data import tokens as tokens_module
from oncelm.data.check import check_folder
from oncelm.data.dataset import TokenDataset
from oncelm.data.layout import find_corpus
from oncelm.data.prepare import prepare
from oncelm.data.tokens import open_tokens

FLIPS = 20  # of each kind of file


@pytest.fixture
def folder(tmp_path, write_jsonl, byte_tokenizer) -> Path:
    texts = [f"It was day {i} in April, caf\u00e9 and clocks." for i in range(60)]
    write_jsonl(tmp_path / "text" / "a.jsonl", texts)
    (tmp_path / "text" / "a.jsonl").open("a").write('{"text": 1}\n')
    write_jsonl(tmp_path / "text" / "b.jsonl", texts[:9])
    return prepare(find_corpus(tmp_path / "text"), byte_tokenizer, tmp_path / "tokens")


def files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != ".lock")


def flip(file: Path, bit: int) -> None:
    """One bit, in place; a second time makes it good."""
    with file.open("r+b") as opened:
        opened.seek(bit // 8)
        (byte,) = opened.read(1)
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


def as_before_checksums(folder: Path) -> None:
    """As an earlier version left it."""
    (folder / "tokenizer" / "checksums.json").unlink()
    for file in files_in(folder):
        if file.name in ("tokens.json", "scan.json") or (file.parent.name == "shards" and file.suffix == ".json"):
            value = json.loads(file.read_text())
            for entry in [value, *(s for source in value.get("train", []) for s in source["shards"])]:
                entry.pop("checksum", None)
                entry.pop("checksums", None)
            file.write_text(json.dumps(value))


def test_a_whole_folder(folder, capsys) -> None:
    findings = check_folder(folder)
    assert (findings.damaged, findings.num_shards, findings.without_checksums) == ((), 2, ())
    assert main(["data", "check", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: 2 shards looked at, 0 files damaged\n"


def test_damage_is_named_and_prepare_makes_it_again(folder, capsys, monkeypatch) -> None:
    before = {file: file.read_bytes() for file in files_in(folder)}
    monkeypatch.setattr("oncelm.data.units.CHECKED_AT_START", 0)  # as of a large folder
    for file in before:
        flip(file, 11)
        assert main(["data", "check", str(folder)]) == 1
        shown = capsys.readouterr().out
        assert file.name in shown
        assert "Next: run the same `oncelm data prepare` again" in shown
        assert main(["data", "prepare", str(folder.parent / "text"), "--out", str(folder)]) == 0
        capsys.readouterr()
        assert {file: file.read_bytes() for file in files_in(folder)} == before


def test_a_missing_file_is_named(folder, capsys) -> None:
    for file in files_in(folder):
        if file.name not in (
            "tokens.json",
            "checksums.json",
        ):  # the one is the folder, the other of a version
            aside = file.rename(folder.parent / "aside")
            assert main(["data", "check", str(folder)]) == 1
            assert file.stem in capsys.readouterr().out
            aside.rename(file)


def test_a_folder_of_an_earlier_version_is_used_and_told_of(folder, capsys) -> None:
    as_before_checksums(folder)
    assert open_tokens(folder).train[0].stream.num_tokens > 0
    assert main(["data", "check", str(folder)]) == 0
    assert "5 files or shards of an earlier version have no checksums" in capsys.readouterr().out
    shards = {file: os.stat(file).st_mtime_ns for file in (folder / "shards").iterdir()}
    assert main(["data", "prepare", str(folder.parent / "text"), "--out", str(folder)]) == 0
    assert {file: os.stat(file).st_mtime_ns for file in (folder / "shards").iterdir()} == shards


def test_text_that_was_not_prepared_is_refused(tmp_path, capsys) -> None:
    (tmp_path / "a.txt").write_text("It was a bright cold day in April.")
    assert main(["data", "check", str(tmp_path)]) == 2
    assert "has no prepared tokens yet" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("limit", [shards_module.CHECKED_AT_START, 0], ids=["small", "large"])
def test_flipped_bits_of_every_kind_of_file(folder, limit, monkeypatch) -> None:
    """`check` notices each; a run refuses the folder, or sees ids within the vocabulary only."""
    monkeypatch.setattr(tokens_module, "CHECKED_AT_START", limit)
    draw, seen = random.Random(0), Counter()
    kinds: dict[str, list[Path]] = {}
    for file in files_in(folder):
        kinds.setdefault(f"KEY{file.suffix}" if file.parent.name == "shards" else file.name, []).append(file)
    assert len(kinds) >= 8
    num_tokens = open_tokens(folder).train[0].stream.num_tokens
    whole = list(open_tokens(folder).train[0].stream.read(0, num_tokens))
    for kind, files in kinds.items():
        for _ in range(FLIPS):
            file = draw.choice(files)
            bit = draw.randrange(8 * file.stat().st_size)
            flip(file, bit)
            damaged = check_folder(folder).damaged
            assert any(file.name in fault for fault in damaged), (kind, bit)
            try:
                tokens = open_tokens(folder)
                dataset = TokenDataset(tokens.train, 64, validation_fraction=0)
                batches = [dataset.batch(step, 8) for step in range(12)]
                assert all(batch.tokens.max() < 260 for batch in batches)
                same = list(tokens.train[0].stream.read(0, num_tokens)) == whole
                seen[kind, "same tokens" if same else "other tokens"] += 1
            except ValueError:
                seen[kind, "refused"] += 1
            flip(file, bit)
    print(dict(seen))
    assert sum(seen.values()) >= 150
    if limit:
        assert not any(what == "other tokens" for _, what in seen)
        assert {seen[kind, "refused"] for kind in ("KEY.tokens", "KEY.documents", "tokens.json")} == {FLIPS}
    assert check_folder(folder).damaged == ()
