"""Where tokens go: what cannot be written to is said before any work, with the way to name another place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from oncelm.cli import main
from oncelm.data.layout import find_corpus
from oncelm.data.place import default_folder, make_place, turn

NOBODY = 65534


@pytest.fixture
def data() -> Iterator[Path]:
    """A folder with a text, which everybody may read; below pytest's own folders only their owner may."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    (folder / "a.txt").write_text("It was a bright cold day in April.\n" * 20)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            path.chmod(0o755)
    shutil.rmtree(folder)


@contextmanager
def permissions() -> Iterator[None]:
    """Within it they count: they do not for root, who becomes nobody. What is imported within may be out of reach."""
    root = not os.geteuid()
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def read_only(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
@pytest.mark.parametrize("prepared", [False, True])
def test_text_in_a_folder_that_cannot_be_written_to(data, tokenizer, prepared, tmp_path, capsys) -> None:
    command = ["data", "prepare", str(data), "--tokenizer", tokenizer]
    assert main([*command, "--out", str(tmp_path / "tokens")]) == 0  # imports all that is needed
    if prepared:
        assert main(["data", "prepare", str(data), "--tokenizer", "bytes"]) == 0
    capsys.readouterr()
    read_only(data)
    with permissions():
        assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"oncelm: error: no place for tokens: {data / '.oncelm'}")
    assert error.endswith("Permission denied; name one (--out of oncelm data, the setting tokens of oncelm train).\n")
    assert error.count("\n") == 1


def test_a_lock_of_somebody_else_is_no_place(data) -> None:
    folder = data / "tokens"
    make_place(folder)
    with turn(folder):
        pass
    folder.chmod(0o777)
    (folder / ".lock").chmod(0o444)
    with permissions():
        make_place(folder)
        with pytest.raises(OSError, match=r"no place for tokens: .*tokens: Permission denied; name one"), turn(folder):
            pass


def test_tokens_are_hidden_beside_their_text(data) -> None:
    assert default_folder(find_corpus(data), "0123456789abcdef") == data / ".oncelm" / "0123456789ab"
    assert default_folder(find_corpus(data / "a.txt"), "0123456789abcdef") == data / ".oncelm" / "a.txt-0123456789ab"
