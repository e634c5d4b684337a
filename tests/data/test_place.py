"""Where tokens go: what cannot be written to is said before any work, with the way to name another place."""

from __future__ import annotations

from pathlib import Path

import pytest

from oncelm.cli import main
from oncelm.data.layout import find_corpus
from oncelm.data.place import default_folder, turn


def read_only(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
@pytest.mark.parametrize("prepared", [False, True])
def test_text_in_a_folder_that_cannot_be_written_to(
    public_folder, permissions, tokenizer, prepared, tmp_path, capsys
) -> None:
    command = ["data", "prepare", str(public_folder), "--tokenizer", tokenizer]
    assert main([*command, "--out", str(tmp_path / "tokens")]) == 0  # imports all that is needed
    if prepared:
        assert main(["data", "prepare", str(public_folder), "--tokenizer", "bytes"]) == 0
    capsys.readouterr()
    read_only(public_folder)
    with permissions():
        assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"oncelm: error: no place for tokens: {public_folder / '.oncelm'}")
    assert error.endswith("Permission denied; name one (--out of oncelm data, the setting tokens of oncelm train).\n")
    assert error.count("\n") == 1


def test_a_lock_of_somebody_else_is_no_place(public_folder, permissions) -> None:
    folder = public_folder / "tokens"
    with turn(folder):
        pass
    folder.chmod(0o777)
    (folder / ".lock").chmod(0o444)
    message = r"no place for tokens: .*tokens: Permission denied; name one"
    with permissions(), pytest.raises(OSError, match=message), turn(folder):
        pass


def test_tokens_are_hidden_beside_their_text(public_folder) -> None:
    assert default_folder(find_corpus(public_folder), "0123456789abcdef") == public_folder / ".oncelm" / "0123456789ab"
    assert (
        default_folder(find_corpus(public_folder / "a.txt"), "0123456789abcdef")
        == public_folder / ".oncelm" / "a.txt-0123456789ab"
    )
