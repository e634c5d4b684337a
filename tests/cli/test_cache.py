"""`oncelm cache`: a document read once is there for every later process, under its name and by its content."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from oncelm import load_tokenizer
from oncelm.cli import main
from oncelm.utils.files import cache_folder
from tests.models.small import make_model

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely. " * 12
LONG = ("--max-model-len", "2000", "--device", "cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "yoco"
    make_model("retention", vocab_size=260, max_position_embeddings=2048, eos_token_id=None).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


@pytest.fixture
def cache(capsys, tmp_path, monkeypatch) -> Callable[..., SimpleNamespace]:
    """Run the verb in a folder of its own; its status, and what it printed."""
    monkeypatch.delenv("COLUMNS", raising=False)  # tables are whole then

    def call(action: str, *arguments: object) -> SimpleNamespace:
        capsys.readouterr()
        status = main(["cache", action, *map(str, arguments), "--cache-dir", str(tmp_path / "store")])
        captured = capsys.readouterr()
        return SimpleNamespace(status=status, out=captured.out, err=captured.err)

    return call


@pytest.fixture
def book(tmp_path) -> Path:
    file = tmp_path / "book.txt"
    file.write_text(TEXT)
    return file


def listed(cache) -> dict[str, dict]:
    return {one["name"]: one for one in json.loads(cache("list", "--json").out)}


def test_save_list_load_ask_and_rm(model, cache, book, tmp_path) -> None:
    saved = cache("save", model, book, *LONG)
    assert saved.status == 0
    tokens = len(TEXT)
    assert re.search(rf"book\.txt: {tokens} tokens in [\d.]+ s, [\d.]+ [KM]iB", saved.out)

    (one,) = listed(cache).values()
    assert (one["name"], one["tokens"], one["model"], one["is_whole"]) == ("book.txt", tokens, str(model), True)
    assert one["bytes"] > 100_000
    assert one["last_used"] is not None
    assert re.search(rf"book\.txt +{tokens} +[\d.]+ [KM]iB +{model} +20\d\d-", cache("list").out)

    book.unlink()  # not needed any more
    loaded = cache("load", model, "book.txt", *LONG)
    assert loaded.status == 0
    assert re.search(rf"book\.txt: {tokens} tokens, .* checked and back in [\d,]+ ms", loaded.err)

    asked = cache("load", model, "book.txt", "--ask", " And so", "--max-new-tokens", 12, *LONG)
    assert asked.out == generated(model, f"{TEXT} And so")

    removed = cache("rm", "book.txt")
    assert removed.status == 0
    assert re.match(r"1 document deleted, [\d.]+ [KM]iB freed", removed.out)
    assert [path.name for path in (tmp_path / "store").iterdir()] == [".lock"]
    assert "No documents in" in cache("list").out


def generated(model: Path, text: str) -> str:
    """What `oncelm generate` writes behind a text."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main(["generate", "--model", str(model), "--device", "cpu", "--prompt", text, "--max-new-tokens", "12"])
    return out.getvalue()


def test_documents_that_begin_alike_share_what_was_read(model, cache, tmp_path) -> None:
    for name, text in (("one", TEXT), ("two", TEXT + "And more of it. " * 5), ("three", "Another text. " * 9)):
        (tmp_path / name).write_text(text)
        assert cache("save", model, tmp_path / name, *LONG).status == 0
    sizes = {name: one["bytes"] for name, one in listed(cache).items()}
    on_disk = sum(path.stat().st_size for path in (tmp_path / "store").glob("*.safetensors"))
    assert on_disk < sum(sizes.values()) - sizes["one"] / 2
    assert cache("rm", "one").status == 0  # `two` stands on it
    assert [name for name, one in listed(cache).items() if one["is_whole"]] == ["three", "two"]
    assert "checked and back" in cache("load", model, "two", *LONG).err
    assert cache("rm", "--all").status == 0
    assert not list((tmp_path / "store").glob("*.safetensors"))


def test_a_damaged_document_is_read_again(model, cache, book, tmp_path) -> None:
    cache("save", model, book, *LONG)
    largest = max((tmp_path / "store").glob("*.safetensors"), key=lambda file: file.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[-4 * len(TEXT) - 9] ^= 1  # before the tokens
    largest.write_bytes(data)
    loaded = cache("load", model, "book.txt", *LONG)
    assert loaded.status == 0
    assert re.search(r"book.txt: .* damaged, and read again in [\d.]+ s", loaded.err)
    assert "checked and back" in cache("load", model, "book.txt", *LONG).err
    for file in (tmp_path / "store").glob("*.safetensors"):
        file.unlink()
    assert not listed(cache)["book.txt"]["is_whole"]
    assert "gone" in cache("list").out
    assert "book.txt is gone" in cache("load", model, "book.txt", *LONG).err
    assert cache("rm", "book.txt").status == 0


def test_a_document_from_standard_input(model, cache, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"A short text.")))
    assert "needs a --name" in cache("save", model, "-", *LONG).err
    assert cache("save", model, "-", "--name", "short", "--kv-dtype", "int8", *LONG).status == 0
    assert listed(cache)["short"]["source"] == "standard input"
    refused = cache("load", model, "short", *LONG)
    assert (refused.status, "--kv-dtype are others" in refused.err) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["sav"], "did you mean 'save'"),
        (["load", "{model}", "bok.txt"], "did you mean 'book.txt'"),
        (["rm", "bok.txt"], "did you mean 'book.txt'"),
        (["rm"], "or give --all"),
        (["rm", "book.txt", "--all"], "or give --all"),
        (["save", "{model}", "{book}", "{book}"], "two of the files are called book.txt"),
        (["save", "{model}", "{book}", "{book}", "--name", "x"], "--name is for one document"),
        (["save", "{model}", "{book}", "--name", "a/b"], "without slashes"),
        (["save", "{model}", "/no/such/file"], "No such file"),
        (["save", "{model}", "{book}", "--max-model-len", "99"], "99"),
    ],
)
def test_mistakes_are_one_line(model, cache, book, tmp_path, arguments, said) -> None:
    (tmp_path / "store").mkdir()
    document = {
        "name": "book.txt",
        "model": "m",
        "fingerprint": "0" * 24,
        "key": "0" * 32,
        "num_tokens": 1,
        "source": "",
    }
    (tmp_path / "store" / "book.txt.document.json").write_text(json.dumps(document))
    result = cache(*[argument.format(model=model, book=book) for argument in arguments])
    assert result.status == 2
    assert said in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    "said",
    [{"name": "../victim"}, {"name": "other"}, {"key": "no digits"}, {"key": 7}, {"num_tokens": "3"}, {"model": None}],
)
def test_files_that_others_wrote_are_no_documents(cache, tmp_path, said) -> None:
    whole = {"name": "foreign", "model": "m", "fingerprint": "0" * 24, "key": "0" * 32, "num_tokens": 3, "source": "s"}
    (tmp_path / "store").mkdir()
    (tmp_path / "victim.document.json").write_text("{}")
    file = tmp_path / "store" / "foreign.document.json"
    file.write_text(json.dumps(whole))
    assert [*listed(cache)] == ["foreign"]
    file.write_text(json.dumps(whole | said))
    assert not listed(cache)
    assert cache("list").status == 0
    assert cache("rm", said.get("name", "foreign")).status == 2
    assert (tmp_path / "victim.document.json").exists()


def test_the_folder_that_the_platform_has(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "oncelm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_folder() == Path.home() / "Library" / "Caches" / "oncelm"
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_folder() == Path.home() / ".cache" / "oncelm"
