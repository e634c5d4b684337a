"""Text to shards: every token there, nothing done twice, nothing lost to a kill, bad input or a full disk."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from oncelm.data import encoding, making, prepare, reading, units, writer
from oncelm.data.layout import find_corpus
from oncelm.data.prepare import MalformedLine, prune
from oncelm.data.tokenizers import train_bpe
from oncelm.data.tokens import open_tokens

TEXTS = [f"Document {i}.\nIt has {i * i} words, or fewer.\n" for i in range(40)]


def stream(folder: Path, source: int = 0) -> np.ndarray:
    tokens = open_tokens(folder).train[source].stream
    return tokens.read(0, tokens.num_tokens)


def expected(tokenizer, texts, bos: bool = False) -> list[int]:
    head = [tokenizer.bos_token_id] if bos else []
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [token for one in ids for token in [*head, *one, tokenizer.eos_token_id]]


def shards_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in (folder / "shards").iterdir()}


@pytest.fixture
def made(monkeypatch):
    """The shards made since the last look, by the files they were made of."""
    seen: list[list[str]] = []
    original = making._make_shard

    def make(unit, *args):
        seen.append([Path(piece.path).name for piece in unit.pieces])
        return original(unit, *args)

    monkeypatch.setattr(making, "_make_shard", make)

    def look() -> list[list[str]]:
        found = sorted(seen)
        seen.clear()
        return found

    return look


def test_every_document_is_there_in_order_with_eos_behind_it(
    tmp_path, write_jsonl, byte_tokenizer, monkeypatch
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 300)
    monkeypatch.setattr(writer, "BATCH_CHARACTERS", 100)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    folder = prepare.prepare(find_corpus(tmp_path), byte_tokenizer)
    assert folder.parent == tmp_path / ".oncelm"
    assert stream(folder).tolist() == expected(byte_tokenizer, TEXTS)
    assert stream(folder).dtype == np.uint16
    (source,) = open_tokens(folder).train
    assert len(source.stream.shards) > 5
    assert sum(shard["documents"] for shard in source.stream.shards) == len(TEXTS)
    starts = source.stream.document_starts(0, source.stream.num_tokens)
    eos = np.flatnonzero(stream(folder) == byte_tokenizer.eos_token_id)
    assert starts.tolist() == (eos[:-1] + 1).tolist()


def test_bos_and_wide_ids(tmp_path, write_jsonl, byte_tokenizer, monkeypatch) -> None:
    for module in ("prepare", "writer", "tokens"):
        monkeypatch.setattr(f"oncelm.data.{module}.token_dtype", lambda vocab_size: np.dtype("<u4"))
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    folder = prepare.prepare(find_corpus(tmp_path), byte_tokenizer, tmp_path / "tokens", bos=True)
    assert stream(folder).tolist() == expected(byte_tokenizer, TEXTS, bos=True)
    assert stream(folder).dtype == np.uint32


def test_a_large_text_file_is_one_document_with_the_tokens_of_the_whole(tmp_path, byte_tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(reading, "_PART_CHARACTERS", 1000)
    monkeypatch.setattr(encoding, "LONG_TEXT", 700)
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 200)
    monkeypatch.setattr(writer, "LONG_TEXT", 700)
    text = "".join(TEXTS)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_bytes((text * 2).encode() + b"\xff")  # not text, as its very end shows
    (tmp_path / "c.txt").write_text("short")
    tokenizer = train_bpe(TEXTS, 300)
    folder = prepare.prepare(find_corpus(tmp_path), tokenizer)
    assert stream(folder).tolist() == expected(tokenizer, [text, "short"])
    whole = open_tokens(folder).train[0].stream
    assert whole.document_starts(0, whole.num_tokens).tolist() == [
        whole.num_tokens - len(expected(tokenizer, ["short"]))
    ]
    malformed = open_tokens(folder).manifest["malformed"]
    assert malformed["count"] == 1
    assert malformed["examples"][0].startswith(f"{tmp_path / 'b.txt'}: not UTF-8 text: byte 0xff at offset")


def test_only_what_changed_is_made_again(tmp_path, write_corpus, byte_tokenizer, made, monkeypatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 500)
    corpus = write_corpus(tmp_path, {"a": (1, TEXTS), "b": (2, TEXTS[:3])})
    folder = prepare.prepare(find_corpus(corpus), byte_tokenizer)
    first = made()
    assert len(first) > 3
    prepare.prepare(find_corpus(corpus), byte_tokenizer)
    assert made() == []
    with (corpus / "shards" / "a.jsonl").open("a") as file:  # appended: the pieces before stay
        file.write('{"text": "more"}\n')
    prepare.prepare(find_corpus(corpus), byte_tokenizer)
    assert made() == [["a.jsonl"]]
    assert stream(folder).tolist() == expected(byte_tokenizer, [*TEXTS, "more"])
    os.utime(corpus / "shards" / "a.jsonl")  # touched, not changed
    prepare.prepare(find_corpus(corpus), byte_tokenizer)
    assert made() == []
    (corpus / "json" / "train.json").write_text('[{"name": "b", "weight": 7}]')
    prepare.prepare(find_corpus(corpus), byte_tokenizer)
    assert made() == []
    assert [(s.name, s.weight) for s in open_tokens(folder).train] == [("b", 7.0)]
    before = set(shards_of(folder))
    assert prune(folder) > 0
    assert set(shards_of(folder)) < before
    assert stream(folder).tolist() == expected(byte_tokenizer, TEXTS[:3])
    other = prepare.prepare(find_corpus(corpus), train_bpe(TEXTS, 270))
    assert other != folder
    assert len(made()) == 1
    prepare.prepare(find_corpus(corpus), byte_tokenizer, folder, bos=True)
    assert len(made()) == 1


def test_a_text_file_more_changes_one_shard(tmp_path, byte_tokenizer, made, monkeypatch) -> None:
    monkeypatch.setattr(units, "FILES_IN_SHARD", 8)
    for i in range(60):
        (tmp_path / f"{i:03d}.txt").write_text(f"text {i}")
    prepare.prepare(find_corpus(tmp_path), byte_tokenizer)
    assert 3 < len(made()) < 20
    (tmp_path / os.fsdecode(b"000a\xff.txt")).write_text("more")  # a name of no known encoding
    folder = prepare.prepare(find_corpus(tmp_path), byte_tokenizer)
    assert len(made()) == 1
    texts = [file.read_text() for file in sorted(tmp_path.glob("*.txt"))]
    assert stream(folder).tolist() == expected(byte_tokenizer, texts)


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    tmp_path, write_jsonl, byte_tokenizer, made, monkeypatch
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 2000)
    monkeypatch.setattr(writer, "BATCH_CHARACTERS", 100)
    text = tmp_path / "text"
    write_jsonl(text / "a.jsonl", TEXTS * 20)
    whole = prepare.prepare(find_corpus(text), byte_tokenizer, tmp_path / "whole")
    num_shards = len(made())
    folder = tmp_path / "killed"
    write = writer.ShardWriter._write

    def write_slowly(self, ids):
        time.sleep(0.002)
        write(self, ids)

    for _ in range(3):
        done = len(list(folder.glob("shards/*.json")))
        with monkeypatch.context() as patch:
            patch.setattr(writer.ShardWriter, "_write", write_slowly)
            arguments = (find_corpus(text), byte_tokenizer, folder)
            process = multiprocessing.get_context("fork").Process(target=prepare.prepare, args=arguments)
            process.start()
        deadline = time.monotonic() + 60
        while len(list(folder.glob("shards/*.json"))) < done + 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
        process.join()
    done = len(list(folder.glob("shards/*.json")))
    assert 6 <= done < num_shards
    assert not (folder / "tokens.json").exists()
    with pytest.raises(ValueError, match=r"holds no prepared tokens"):
        open_tokens(folder)
    prepare.prepare(find_corpus(text), byte_tokenizer, folder)
    assert len(made()) == num_shards - done
    assert shards_of(folder) == shards_of(whole)
    assert (folder / "tokens.json").read_bytes() == (whole / "tokens.json").read_bytes()


@pytest.mark.parametrize("suffix", ["tokens", "documents", "json"])
@pytest.mark.parametrize("damage", [Path.unlink, lambda file: os.truncate(file, 7)], ids=["missing", "cut off"])
def test_a_shard_that_is_not_whole_is_made_again(
    tmp_path, write_jsonl, byte_tokenizer, made, monkeypatch, suffix, damage
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 500)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    folder = prepare.prepare(find_corpus(tmp_path), byte_tokenizer)
    whole = shards_of(folder)
    assert len(made()) > 3
    damage(sorted(folder.glob(f"shards/*.{suffix}"))[1])
    assert prepare.prepare(find_corpus(tmp_path), byte_tokenizer) == folder
    assert made() == [["a.jsonl"]]
    assert shards_of(folder) == whole
    assert stream(folder).tolist() == expected(byte_tokenizer, TEXTS)


def test_malformed_lines_are_counted_and_told(tmp_path, write_jsonl, byte_tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 300)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    lines = path.read_text().splitlines(keepends=True)
    lines[20:20] = ["garbage\n", '{"id": 1}\n']
    path.write_text("".join(lines))
    (tmp_path / "b.jsonl").touch()
    folder = prepare.prepare(find_corpus(tmp_path), byte_tokenizer)
    assert stream(folder).tolist() == expected(byte_tokenizer, TEXTS)
    malformed = open_tokens(folder).manifest["malformed"]
    assert malformed["count"] == 3
    assert [example.split(": ")[0] for example in malformed["examples"]] == [
        f"{path}:21",
        f"{path}:22",
        str(tmp_path / "b.jsonl"),
    ]
    with pytest.raises(MalformedLine, match=r"a\.jsonl:21: not JSON"):  # also where the shards are there
        prepare.prepare(find_corpus(tmp_path), byte_tokenizer, strict=True)
    with pytest.raises(MalformedLine, match=r"a\.jsonl:21: not JSON"):
        prepare.prepare(find_corpus(tmp_path), byte_tokenizer, tmp_path / "fresh", strict=True)


@pytest.mark.parametrize("made_before", ["", "a", "b", "c", "ab", "ac", "bc", "abc"])
def test_strict_tells_the_first_of_the_corpus_whatever_was_made_before(
    tmp_path, write_jsonl, byte_tokenizer, made_before
) -> None:
    text, tokens = tmp_path / "text", tmp_path / "tokens"
    write_jsonl(text / "0.jsonl", ["fine"])
    for name in "abc":
        file = write_jsonl(text / f"{name}.jsonl", ["fine", name])
        file.write_text(file.read_text() + "garbage\n")
    (text / "aa.jsonl").touch()
    (text / "d.jsonl").write_bytes((text / "a.jsonl").read_bytes())  # of one shard with a
    for name in made_before:
        prepare.prepare(find_corpus(text / f"{name}.jsonl"), byte_tokenizer, tokens)
    for first in ("a.jsonl:3: not JSON", "aa.jsonl: the file is empty", "b.jsonl:3: not JSON", "c.jsonl:3: not JSON"):
        with pytest.raises(MalformedLine) as failure:
            prepare.prepare(find_corpus(text), byte_tokenizer, tokens, strict=True)
        assert str(failure.value).startswith(str(text / first))
        (text / first.split(":")[0]).unlink()


def test_a_file_that_changes_while_it_is_read_makes_no_shard(
    tmp_path, write_jsonl, byte_tokenizer, monkeypatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    original = writer.ShardWriter.flush

    def flush(self):
        os.utime(path, ns=(0, 0))
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(writer.ShardWriter, "flush", flush)
        with pytest.raises(ValueError, match=r"a\.jsonl was changed while it was read"):
            prepare.prepare(find_corpus(tmp_path), byte_tokenizer)
    assert not list(tmp_path.glob(".oncelm/*/shards/*.json"))
    assert stream(prepare.prepare(find_corpus(tmp_path), byte_tokenizer)).tolist() == expected(byte_tokenizer, TEXTS)


def test_a_source_without_a_document_is_an_error_with_the_first_reason(tmp_path, write_corpus, byte_tokenizer) -> None:
    corpus = write_corpus(tmp_path, {"a": (1, TEXTS), "b": (1, [])})
    with pytest.raises(ValueError, match=r"source 'b' has no document in its 1 file.*b\.jsonl: the file is empty"):
        prepare.prepare(find_corpus(corpus), byte_tokenizer)
    (corpus / "shards" / "b.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"source 'b' has no document in its 1 file.*; every line of them is blank"):
        prepare.prepare(find_corpus(corpus), byte_tokenizer)
    (corpus / "shards" / "b.jsonl").write_bytes(bytes(range(256)) * 100)
    with pytest.raises(ValueError, match=r"source 'b' has no document.*b\.jsonl:1: not "):
        prepare.prepare(find_corpus(corpus), byte_tokenizer)


def test_tokenizers_without_the_special_tokens_are_refused(tmp_path, write_jsonl) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    tokenizer = train_bpe(TEXTS, 270)
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="no bos token"):
        prepare.prepare(find_corpus(tmp_path), tokenizer, bos=True)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        prepare.prepare(find_corpus(tmp_path), tokenizer)


def test_a_full_disk_keeps_the_shards_that_are_complete(
    tmp_path, write_jsonl, byte_tokenizer, made, monkeypatch
) -> None:
    monkeypatch.setattr(reading, "PIECE_BYTES", 500)
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    writes = 0

    def write(self, ids):
        nonlocal writes
        writes += 1
        if writes > 25:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, ids)

    original = writer.ShardWriter._write
    with monkeypatch.context() as patch:
        patch.setattr(writer.ShardWriter, "_write", write)
        with pytest.raises(OSError, match=r"cannot write .*\.tokens \(.* MiB free there\): .*No space left") as failure:
            prepare.prepare(find_corpus(tmp_path), byte_tokenizer, tmp_path / "tokens", workers=1)
    assert "\n" not in str(failure.value)
    kept = len(list((tmp_path / "tokens" / "shards").glob("*.json")))
    assert kept >= 1
    assert not list((tmp_path / "tokens" / "shards").glob(".*"))
    made()
    folder = prepare.prepare(find_corpus(tmp_path), byte_tokenizer, tmp_path / "tokens")
    assert len(made()) == len(open_tokens(folder).train[0].stream.shards) - kept
    assert stream(folder).tolist() == expected(byte_tokenizer, TEXTS)


def test_two_at_a_time_take_turns_and_the_second_says_that_it_waits(
    tmp_path, write_jsonl, byte_tokenizer, made, caplog
) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    folder = tmp_path / "tokens"
    folder.mkdir()
    lock = FileLock(folder / ".lock")
    lock.acquire()
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(prepare.prepare, find_corpus(tmp_path), byte_tokenizer, folder)
        deadline = time.monotonic() + 60
        while not caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        assert f"waiting for another process that prepares {folder}" in caplog.text
        assert made() == []
        lock.release()
        waiting.result()
    assert stream(folder).tolist() == expected(byte_tokenizer, TEXTS)


def test_a_place_that_cannot_be_written_is_named(tmp_path, write_jsonl, byte_tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / ".oncelm").write_text("a file, not a folder")
    with pytest.raises(OSError, match=r"no place for tokens: .*\.oncelm.*; name one \(--out of oncelm data"):
        prepare.prepare(find_corpus(tmp_path), byte_tokenizer)


def test_text_is_never_pruned_and_tokens_do_not_go_among_it(tmp_path, write_corpus, byte_tokenizer) -> None:
    corpus = write_corpus(tmp_path, {"a": (1, TEXTS)})  # whose text is in corpus/shards
    with pytest.raises(ValueError, match=r"folder .* is the text's own; name another"):
        prepare.prepare(find_corpus(corpus), byte_tokenizer, corpus)
    folder = prepare.prepare(find_corpus(corpus), byte_tokenizer, tmp_path / "tokens")
    stale = folder / "shards" / f"{0:032x}.tokens"
    stale.write_bytes(b"12")
    other = folder / "shards" / "books-0.jsonl"
    other.write_text("{}")
    assert prune(folder) == 2
    assert not stale.exists()
    assert other.exists()


def test_damaged_folders_are_named(tmp_path, write_jsonl, byte_tokenizer) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    folder = prepare.prepare(find_corpus(tmp_path), byte_tokenizer, tmp_path / "tokens")
    (file,) = folder.glob("shards/*.tokens")
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=rf"shard {file.name} has {len(content) - 1} bytes instead of {len(content)}"):
        open_tokens(folder)
    file.unlink()
    with pytest.raises(ValueError, match=f"shard {file.name} is missing"):
        open_tokens(folder)
    manifest = json.loads((folder / "tokens.json").read_text())
    del manifest["checksum"]  # of other entries
    (folder / "tokens.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="it is of format 99, this version reads 1"):
        open_tokens(folder)


def test_a_failure_stops_the_others_within_a_document(tmp_path, write_jsonl, byte_tokenizer, monkeypatch) -> None:
    for module, name, value in ((reading, "_PART_CHARACTERS", 100), (encoding, "LONG_TEXT", 120)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 30)
    monkeypatch.setattr(writer, "LONG_TEXT", 120)
    write_jsonl(tmp_path / "a.jsonl", ["bad"])
    (tmp_path / "b.txt").write_text("One line.\n" * 20_000)
    encode, encode_piece = encoding.Encoder.encode, encoding.Encoder.encode_piece
    pieces: list[int] = []
    under_way = threading.Event()

    def fail(self, texts):
        if texts == ["bad"]:
            assert under_way.wait(30)
            raise MemoryError("no room")
        return encode(self, texts)

    def count(self, text, continued):
        pieces.append(len(text))
        if len(pieces) == 10:
            under_way.set()
        time.sleep(0.002)
        return encode_piece(self, text, continued)

    monkeypatch.setattr(encoding.Encoder, "encode", fail)
    monkeypatch.setattr(encoding.Encoder, "encode_piece", count)
    with pytest.raises(MemoryError, match="no room"):
        prepare.prepare(find_corpus(tmp_path), byte_tokenizer, tmp_path / "tokens", workers=2)
    assert sum(pieces) < 100_000  # of 200,000 characters
    assert not list((tmp_path / "tokens" / "shards").iterdir())


def test_the_last_shard_is_encoded_by_all_threads(tmp_path, write_jsonl, byte_tokenizer, monkeypatch) -> None:
    """One large file beside small ones that are soon done."""
    monkeypatch.setattr(writer, "BATCH_CHARACTERS", 1)
    lock, now, most = threading.Lock(), 0, 0
    encode = encoding.Encoder.encode

    def slow(self, texts):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        if texts[0].startswith("large"):
            time.sleep(0.01)
        encoded = encode(self, texts)
        with lock:
            now -= 1
        return encoded

    write_jsonl(tmp_path / "large.jsonl", [f"large {number}" for number in range(60)])
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", [f"small {number}"])
    with monkeypatch.context() as patch:
        patch.setattr(encoding.Encoder, "encode", slow)
        prepare.prepare(find_corpus(tmp_path), byte_tokenizer, workers=4)
    assert most == 4


def test_lists_that_are_cut_off_are_made_again(tmp_path, write_jsonl, byte_tokenizer, made, caplog) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    folder = prepare.prepare(find_corpus(tmp_path), byte_tokenizer)
    made()
    for name in ("scan.json", "tokens.json"):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-9])
        prepare.prepare(find_corpus(tmp_path), byte_tokenizer, folder)
        assert (folder / name).read_bytes() == content
        assert f"{name} is damaged: making it again" in caplog.text
    assert not made()
