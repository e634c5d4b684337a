"""A run's folder is left to the run that writes there."""

from __future__ import annotations

import pytest

from oncelm.cli import main
from oncelm.train.claim import claim, run_lock


def test_a_folder_is_claimed_once(tmp_path) -> None:
    mine, other = run_lock(tmp_path / "run"), run_lock(tmp_path / "run")
    claim(mine)
    with pytest.raises(ValueError, match=r"out '.*run' is being written by another run; .* delete .*\.lock"):
        claim(other)
    mine.release()
    claim(other)
    other.release()


def test_the_tokenizer_of_a_run_that_goes_on_is_not_replaced(tmp_path, capsys) -> None:
    """By another run in its folder, which used to be refused only behind that: the first was resumed with it."""
    (tmp_path / "a.txt").write_text("It was a bright cold day in April. " * 50)
    (tmp_path / "b.txt").write_text("The clocks were striking thirteen. " * 50)
    command = ["--out", str(tmp_path / "run"), "--tokenizer", "bpe:280", "--steps", "1", "--set", "seq_len=16"]
    assert main(["train", str(tmp_path / "a.txt"), *command, "batch_size=2", "save_every=null"]) == 0
    before = {file: file.read_bytes() for file in (tmp_path / "run" / "tokenizer").iterdir()}
    for folder in (tmp_path / "run" / "checkpoints").glob("*"):
        folder.rename(tmp_path / folder.name)  # as before the first checkpoint
    lock = run_lock(tmp_path / "run")
    claim(lock)
    capsys.readouterr()
    assert main(["train", str(tmp_path / "b.txt"), *command, "batch_size=2"]) == 2
    assert "is being written by another run" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in (tmp_path / "run" / "tokenizer").iterdir()} == before
    lock.release()
