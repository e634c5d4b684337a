"""Checkpoint folders: complete or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from oncelm.train.checkpoint import find_checkpoint, list_checkpoints, save_checkpoint
from oncelm.utils.files import clean_up


def writer(text: str = "weights"):
    def write(folder) -> None:
        (folder / "model.bin").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "more.bin").write_text(text * 2)

    return write


def steps(root) -> list[int]:
    return [step for step, _ in list_checkpoints(root)]


def test_only_the_last_ones_are_kept(tmp_path) -> None:
    for step in (5, 10, 999_999, 1_000_000):
        save_checkpoint(tmp_path, step, writer(), keep=2)
    assert steps(tmp_path) == [999_999, 1_000_000]
    assert find_checkpoint(tmp_path).name == "step-1000000"


def test_none_where_there_are_none(tmp_path) -> None:
    assert find_checkpoint(tmp_path / "nowhere") is None


def flip_a_byte(folder) -> None:
    (folder / "model.bin").write_text("Weights")


def cut_short(folder) -> None:
    (folder / "sub" / "more.bin").write_text("")


def lose_a_file(folder) -> None:
    (folder / "model.bin").unlink()


def lose_the_manifest(folder) -> None:
    (folder / "manifest.json").unlink()


def garble_the_manifest(folder) -> None:
    (folder / "manifest.json").write_bytes(b"\xff\x00")


@pytest.mark.parametrize("damage", [flip_a_byte, cut_short, lose_a_file, lose_the_manifest, garble_the_manifest])
def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path, caplog, damage) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, writer(), keep=2)
    damage(tmp_path / "step-000002")
    assert find_checkpoint(tmp_path).name == "step-000001"
    assert "step-000002 is damaged" in caplog.text
    damage(tmp_path / "step-000001")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged"):
        find_checkpoint(tmp_path)


def test_a_damaged_later_one_does_not_push_out_a_good_one(tmp_path) -> None:
    for step in (1, 9):
        save_checkpoint(tmp_path, step, writer(), keep=2)
    flip_a_byte(tmp_path / "step-000009")
    save_checkpoint(tmp_path, 2, writer(), keep=1)
    assert find_checkpoint(tmp_path).name == "step-000002"


def test_a_kill_during_a_save_leaves_the_one_before(tmp_path) -> None:
    save_checkpoint(tmp_path, 1, writer(), keep=1)

    def write_half_and_die(folder) -> None:
        (folder / "model.bin").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        save_checkpoint(tmp_path, 2, write_half_and_die, keep=1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert find_checkpoint(tmp_path).name == "step-000001"
    assert len(list(tmp_path.iterdir())) == 2
    clean_up(tmp_path)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "the same step again"])
def test_a_full_disk_leaves_everything_as_it_was(tmp_path, step: int) -> None:
    save_checkpoint(tmp_path, 1, writer(), keep=1)

    def write_until_full(folder) -> None:
        (folder / "model.bin").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"cannot write .*step-00000\d \(.* MiB free there\).*No space left"):
        save_checkpoint(tmp_path, step, write_until_full, keep=1)
    assert [folder.name for folder in tmp_path.iterdir()] == ["step-000001"]
    assert find_checkpoint(tmp_path).name == "step-000001"
