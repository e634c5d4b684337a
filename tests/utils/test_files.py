"""Atomic writes: the old file or the new one, never half of either, whatever happens."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from oncelm.utils.errors import check_positive, unknown
from oncelm.utils.files import atomic_file, atomic_folder, clean_up


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "file.txt"
    for text in ("one", "two"):
        with atomic_file(target) as temporary:
            temporary.write_text(text)
        assert target.read_text() == text
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def write() -> None:
        with atomic_file(target) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path):
        with pytest.raises(ValueError, match="is there and no file"), atomic_file(path) as file:
            file.write_text("x")
    assert pipe.is_fifo()


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for name in ("a", "b"):
        with atomic_folder(target) as temporary:
            (temporary / name).write_text(name)
        assert [file.name for file in target.iterdir()] == [name]
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "a").write_text("a")

    def write() -> None:
        with atomic_folder(target) as temporary:
            (temporary / "b").write_text("b")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert [file.name for file in target.iterdir()] == ["a"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_killed_while_a_folder_is_replaced_the_old_or_the_new_one_is_there(tmp_path: Path, moves: int) -> None:
    target = tmp_path / "model"
    with atomic_folder(target) as temporary:
        (temporary / "old").touch()
    child = os.fork()
    if child == 0:
        replace = Path.replace
        done = []

        def replace_until_killed(self: Path, other: Path) -> None:
            if len(done) == moves:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(replace(self, other))

        Path.replace = replace_until_killed
        with atomic_folder(target) as temporary:
            (temporary / "new").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    (tmp_path / ".config.tmp").touch()  # somebody else's
    clean_up(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".config.tmp", "model"]
    assert [path.name for path in target.iterdir()] == ["new" if moves == 2 else "old"]
    clean_up(tmp_path / "nowhere")


def test_permissions_are_the_usual_ones_and_other_threads_keep_theirs(tmp_path: Path, monkeypatch) -> None:
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("the mask belongs to all threads"))
            with atomic_file(tmp_path / "file") as file:
                file.write_text("text")
            with atomic_folder(tmp_path / "folder"):
                pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_errors_name_the_nearest_choice() -> None:
    assert str(unknown("size", "smal", ["small", "large"])) == (
        "unknown size 'smal'; did you mean 'small'? Allowed: small, large."
    )
    with pytest.raises(ValueError, match="width must be a number above 0, got -1"):
        check_positive(height=1, width=-1)
