"""Atomic writes: the old file or the new one, never half of either, whatever happens."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from oncelm.utils import files
from oncelm.utils.errors import check_positive, unknown
from oncelm.utils.files import atomic_file, atomic_folder, bring_back, clean_up
from tests.full_disk import small_files


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
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is there and no folder"), atomic_folder(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "x"


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


def run_and_kill(function: Callable[[], None]) -> None:
    """Run `function` in a process that is killed at its end, if it does not kill itself before."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            die()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_at(call: int, function: Callable) -> Callable:
    """`function`, until the call of that number, which kills the process instead."""
    calls = itertools.count()

    def until_then(*arguments: Any) -> Any:
        if next(calls) == call:
            die()
        return function(*arguments)

    return until_then


def replace_folder(target: Path) -> None:
    with atomic_folder(target) as temporary:
        (temporary / "new").touch()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def model(tmp_path: Path) -> Path:
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "old").touch()
    return tmp_path / "model"


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_beside_the_exchange_of_folders_a_whole_one_is_there_at_once(model: Path, when: str) -> None:
    exchange = files._exchange

    def die_beside(*paths: Path) -> None:
        if when == "after":
            assert exchange(*paths)
        die()

    files._exchange = die_beside
    try:
        run_and_kill(lambda: replace_folder(model))
    finally:
        files._exchange = exchange
    assert names(model) == ["new" if when == "after" else "old"]
    replace_folder(model)
    assert (names(model.parent), names(model)) == (["model"], ["new"])


# where folders cannot be exchanged: new -> model (refused), model -> old, new -> model
@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("repair", ["clean_up", "bring_back", "atomic_folder"])
def test_killed_between_two_renames_the_old_folder_comes_back(model: Path, call: int, repair: str, monkeypatch) -> None:
    (model.parent / ".config.tmp").touch()  # somebody else's
    with monkeypatch.context() as patch:
        patch.setattr(files, "_exchange", lambda *paths: False)
        patch.setattr(Path, "replace", dies_at(call, Path.replace))
        run_and_kill(lambda: replace_folder(model))
    assert model.exists() == (call != 2)
    if repair == "atomic_folder":
        replace_folder(model)
    elif repair == "clean_up":
        clean_up(model.parent)
    else:
        bring_back(model)
    if repair != "bring_back":
        assert names(model.parent) == [".config.tmp", "model"]
    assert names(model) == ["new" if call == 3 or repair == "atomic_folder" else "old"]
    clean_up(model / "nowhere")
    bring_back(model / "nowhere" / "model")


def test_an_error_between_two_renames_keeps_the_old_folder(model: Path, monkeypatch) -> None:
    replace, moves = Path.replace, []

    def fail_last(self: Path, target: Path) -> Path:
        moves.append(self.name)
        if moves == ["new", "model", "new"]:
            raise OSError(errno.EIO, "Input/output error", str(self))
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_exchange", lambda *paths: False)
        patch.setattr(Path, "replace", fail_last)
        with pytest.raises(OSError, match="cannot write"):
            replace_folder(model)
    assert (names(model.parent), names(model)) == (["model"], ["old"])


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_the_next_save_of_a_name_removes_what_a_kill_left_and_nothing_else(tmp_path: Path, write: Callable) -> None:
    def half(name: str) -> None:
        with write(tmp_path / name) as temporary:
            file = temporary / "part" if temporary.is_dir() else temporary
            file.write_text("half")
            file.with_name(".tmpX").write_text("a file that the writer itself makes beside")
            die()

    for name in ("one", "one", "another", "one.two"):
        run_and_kill(lambda name=name: half(name))
    (tmp_path / f".one.{'0' * 16}.tmp").write_text("left by an earlier version")
    assert len(names(tmp_path)) == 4
    with write(tmp_path / "one"):
        pass
    left = [re.sub("[0-9a-f]{16}", "*", name) for name in names(tmp_path)]
    assert left == [".another.*.tmp", ".one.two.*.tmp", "one"]
    clean_up(tmp_path)
    assert names(tmp_path) == ["one"]


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_what_a_living_process_writes_is_left_alone(tmp_path: Path, write: Callable) -> None:
    target = tmp_path / "name"
    fork = multiprocessing.get_context("fork")
    writing, go_on = fork.Event(), fork.Event()

    def write_slowly() -> None:
        with write(target) as temporary:
            (temporary / "file" if temporary.is_dir() else temporary).write_text("of the other process")
            writing.set()
            assert go_on.wait(60)

    other = fork.Process(target=write_slowly)
    other.start()
    assert writing.wait(60)
    clean_up(tmp_path)
    with write(target):
        pass
    clean_up(tmp_path)
    assert len(names(tmp_path)) == 2
    go_on.set()
    other.join()
    assert other.exitcode == 0
    assert (target / "file" if target.is_dir() else target).read_text() == "of the other process"
    assert names(tmp_path) == ["name"]


def test_two_that_make_one_folder_at_a_time_both_succeed(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "bpe-300") as first, atomic_folder(tmp_path / "bpe-300") as second:
        (first / "file").write_text("the same")
        (second / "file").write_text("the same")
        clean_up(tmp_path)
    assert (names(tmp_path), names(tmp_path / "bpe-300")) == (["bpe-300"], ["file"])


def test_a_disk_without_locks_is_written_and_keeps_leftovers(tmp_path: Path, monkeypatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    def half() -> None:
        with atomic_file(tmp_path / "name"):
            die()

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    run_and_kill(half)
    with atomic_file(tmp_path / "name") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "name").read_text() == "whole"
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] Gloo connectFullMesh failed: Connection closed by peer"),
        torch.OutOfMemoryError("CUDA out of memory"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/source.txt"),
        InterruptedError("stopped"),
    ],
)
@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_what_is_no_failed_write_is_not_told_as_one(tmp_path: Path, write: Callable, error: Exception) -> None:
    def fail() -> None:
        with write(tmp_path / "name"):
            raise error

    with pytest.raises(type(error)) as raised:
        fail()
    assert raised.value is error
    assert names(tmp_path) == []


@pytest.mark.parametrize("save", [save_file, torch.save])
def test_failed_writes_name_the_file_and_the_room(tmp_path: Path, save: Callable) -> None:
    def write() -> None:
        with atomic_file(tmp_path / "name") as temporary:
            save({"x": torch.zeros(10_000)}, temporary)

    with small_files(), pytest.raises(OSError, match=r"cannot write .*/name \(.* MiB free there\)"):
        write()
    assert names(tmp_path) == []


def test_permissions_are_the_usual_ones_and_other_threads_keep_theirs(tmp_path: Path, monkeypatch) -> None:
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("the mask belongs to all threads"))
            with atomic_file(tmp_path / "file") as file:
                save_file({"x": torch.zeros(3)}, file)
            with atomic_folder(tmp_path / "folder") as folder:
                save_file({"x": torch.zeros(3)}, folder / "weights")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "folder" / "weights").stat().st_mode & 0o777 == 0o640


def test_errors_name_the_nearest_choice() -> None:
    assert str(unknown("size", "smal", ["small", "large"])) == (
        "unknown size 'smal'; did you mean 'small'? Allowed: small, large."
    )
    with pytest.raises(ValueError, match="width must be a number above 0, got -1"):
        check_positive(height=1, width=-1)
