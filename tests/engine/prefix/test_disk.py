"""What can happen to files and to those who write them: nothing wrong is ever restored."""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from oncelm.engine.prefix import disk
from tests.engine.prefix.stand_in import Device, same, text
from tests.full_disk import small_files


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict]:
    """A file, and what is in it."""
    device = Device(directory=tmp_path)
    made = device.remember(text(10))
    device.cache.close()
    (file,) = files(tmp_path)
    return file, made


def restored(folder: Path) -> dict | None:
    device = Device(directory=folder)
    n, content = device.recall(text(11))
    device.check()
    return content if n else None


def check_refused(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    device = Device(directory=file.parent)
    assert device.recall(text(11))[0] == 0
    assert device.cache.match(text(11)).n == 0
    assert device.cache.counts.damaged == 1
    assert not file.exists()
    device.check()


def test_every_byte_of_a_file_damaged_is_refused(written) -> None:
    file, made = written
    data = file.read_bytes()
    for place in range(len(data)):
        other = data[place] ^ (1 << place % 8)
        check_refused(file, data[:place] + bytes([other]) + data[place + 1 :])
    file.write_bytes(data)
    assert same(restored(file.parent), made)


@pytest.mark.slow
def test_every_bit_of_a_file_flipped_is_refused(written) -> None:
    file, _ = written
    data = file.read_bytes()
    for place in range(len(data)):
        for bit in range(8):
            check_refused(file, data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :])


def test_every_file_that_was_cut_off_or_goes_on_is_refused(written) -> None:
    file, _ = written
    data = file.read_bytes()
    for size in range(0, len(data), 7):
        check_refused(file, data[:size])
    check_refused(file, data + b"\0")


@pytest.mark.slow
def test_a_file_cut_off_at_every_byte_is_refused(written) -> None:
    file, _ = written
    data = file.read_bytes()
    for size in range(len(data)):
        check_refused(file, data[:size])


def test_a_file_under_the_name_of_another_is_refused(tmp_path: Path) -> None:
    device = Device(directory=tmp_path)
    for seed in (0, 1):
        device.remember(text(10, seed))
    device.cache.close()
    one, other = files(tmp_path)
    shutil.copy(one, other)
    device = Device(directory=tmp_path)
    assert sorted(device.recall(text(11, seed))[0] for seed in (0, 1)) == [0, 10]
    assert device.cache._below._folder.num_damaged == 1


def test_a_damaged_file_takes_those_that_stand_on_it_with_it(tmp_path, caplog) -> None:
    device = Device(directory=tmp_path)
    request = device.request(text(30))
    for n in (10, 20, 30):
        request.read(n)
        request.add()
    middle = request.after.parent
    request.end()
    device.cache.close()
    path = device.cache._below._folder.place(middle.key)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    device = Device(directory=tmp_path)
    with caplog.at_level(logging.WARNING):
        assert device.cache.match(text(31)).n == 30  # who knows, from headers
        assert device.recall(text(31))[0] == 0
        assert device.recall(text(31))[0] == 10
    assert device.cache.counts.damaged == 1
    assert device.cache.counts.hits == 1
    assert len({record.getMessage() for record in caplog.records}) == len(caplog.records)
    device.check()


def test_a_child_of_another_computation_of_its_parent_is_not_used(tmp_path: Path) -> None:
    device = Device(directory=tmp_path)
    request = device.request(text(20), flavour=1)
    for n in (10, 20):
        request.read(n)
        request.add()
    parent = request.after.parent
    device.cache.close()
    device.cache._below._folder.place(parent.key).unlink()
    again = Device(directory=tmp_path)
    assert again.cache.match(text(21)).n == 0
    made = again.remember(text(10), flavour=2)
    again.cache.close()
    last = Device(directory=tmp_path)
    n, content = last.recall(text(21))
    assert n == 10
    assert same(content, made)


def test_processes_see_each_others_files(tmp_path: Path) -> None:
    one, other = Device(directory=tmp_path), Device(directory=tmp_path)
    made = one.remember(text(20))
    one.cache.flush()
    assert same(other.recall(text(21))[1], made)
    longer = other.remember(text(30))
    other.cache.flush()
    assert same(one.recall(text(31))[1], longer)
    for file in files(tmp_path):
        file.unlink()
    other.cache.free(other.pages.num_pages - 1)
    assert other.recall(text(31))[0] == 0
    assert not len(other.cache.tree)


def test_what_was_written_here_is_no_reason_to_look_at_the_folder(tmp_path, monkeypatch) -> None:
    looked = []
    real = disk.Folder._listing
    monkeypatch.setattr(disk, "_TICK", 1 << 60)
    monkeypatch.setattr(disk.Folder, "_listing", lambda self: looked.append(self) or real(self))
    one, other = Device(directory=tmp_path), Device(directory=tmp_path)
    for seed in range(5):
        one.remember(text(20, seed))
        one.cache.flush()
    times = looked.count(one.cache._below._folder)
    assert times <= 2
    assert other.recall(text(21, 4))[0] == 20
    monkeypatch.setattr(disk, "_TICK", 0)
    one.cache.match(text(9))
    one.cache.match(text(9))
    assert looked.count(one.cache._below._folder) == times + 1


def test_two_processes_that_write_the_same_keep_one_file(tmp_path: Path) -> None:
    one, other = Device(directory=tmp_path), Device(directory=tmp_path)
    for device in (one, other):
        request = device.request(text(20))
        request.read(20)
        request.add()
        request.end()
        device.cache.flush()
    assert len(files(tmp_path)) == 1
    assert one.cache.nbytes()["disk"] == other.cache.nbytes()["disk"] > 0


def test_a_file_that_goes_while_it_is_opened(written, monkeypatch) -> None:
    """Another process had to make room: it is no hit, and no more. safetensors opens a file itself, then torch does."""
    file, _ = written
    device = Device(directory=file.parent)

    def gone(path: Path, framework: str) -> None:
        path.unlink()
        torch.UntypedStorage.from_file(str(path), False, 8)

    monkeypatch.setattr(disk, "safe_open", gone)
    assert device.recall(text(11))[0] == 0
    assert device.cache.counts.damaged == 0
    device.check()


def test_a_full_disk_means_that_nothing_is_kept(tmp_path, monkeypatch, caplog) -> None:
    def save(*args, **options) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    device = Device(num_pages=200, directory=tmp_path)
    with caplog.at_level(logging.WARNING), monkeypatch.context() as patch:
        patch.setattr(disk, "save_file", save)
        for seed in range(3):
            device.remember(text(20, seed))
        device.cache.flush()
    assert len(caplog.records) == 1
    assert "not kept" in caplog.text
    assert not files(tmp_path)
    assert device.recall(text(21))[0] == 20  # on the device
    assert device.cache.counts.not_written == 3
    made = device.remember([*text(20), *text(4, 9)])  # there is room again: with what it stands on
    device.cache.close()
    assert same(Device(directory=tmp_path).recall([*text(20), *text(4, 9), 1])[1], made)


def test_a_limit_in_the_writer_of_files(tmp_path, caplog) -> None:
    device = Device(num_pages=600, directory=tmp_path)
    with caplog.at_level(logging.WARNING), small_files():
        device.remember(text(2000))
        device.cache.flush()
    assert not files(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] in ([], [".lock"])
    assert "not kept" in caplog.text
    device.check()


def test_a_folder_that_cannot_be_written_or_read(tmp_path, caplog) -> None:
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        device = Device(directory=tmp_path / "file" / "store")
        for seed in range(2):
            device.remember(text(20, seed))
        assert device.recall(text(21))[0] == 20
        device.cache.close()
    assert len(caplog.records) == 1


def test_what_nobody_closed_is_written_before_python_ends(tmp_path, monkeypatch) -> None:
    at_exit = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    device = Device(directory=tmp_path)
    device.cache._below._writer.submit(lambda: time.sleep(0.05))
    device.remember(text(20))
    assert not files(tmp_path)
    (flush,) = at_exit
    flush()
    assert len(files(tmp_path)) == 1


def test_a_folder_that_disappears(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    device = Device(directory=folder)
    device.remember(text(20))
    device.remember(text(20, 2))
    device.cache.flush()
    device.recall(text(21))
    device.cache.free(num_pages=device.pages.num_free + 1)
    shutil.rmtree(folder)
    assert device.recall(text(21, 2))[0] == 0
    assert device.recall(text(21))[0] == 20  # still on the device
    made = device.remember(text(20, 1))
    device.cache.close()
    assert same(Device(directory=folder).recall(text(21, 1))[1], made)
    device.check()


# -- processes --------------------------------------------------------------------------------------------------------


def remember_for_ever(folder: Path, start: int) -> None:
    device = Device(num_pages=200, directory=folder)
    for seed in range(start, 1 << 30):
        device.remember([*text(200, seed % 40), *text(9, seed)])
        device.cache.flush()


def kill_while_writing(folder: Path, times: int) -> None:
    fork = multiprocessing.get_context("fork")
    draw = random.Random(0)
    found = 0
    for turn in range(times):
        process = fork.Process(target=remember_for_ever, args=(folder, turn * 1000))
        process.start()
        time.sleep(0.05 + 0.1 * draw.random())
        process.kill()
        process.join()
        device = Device(num_pages=200, directory=folder)
        assert len([path for path in folder.iterdir() if path.name.endswith(".tmp")]) == 0
        for seed in (turn * 1000, turn * 1000 + 1, turn * 1000 + 7):
            tokens = [*text(200, seed % 40), *text(9, seed)]
            n, content = device.recall([*tokens, 0])
            assert n in (0, 209)
            assert not n or same(content, Device(num_pages=200).remember(tokens))
            found += n > 0
        assert device.cache._below._folder.num_damaged == 0
        device.check()
    assert found > times / 2


def test_kills_while_snapshots_are_written(tmp_path: Path) -> None:
    kill_while_writing(tmp_path, 5)


@pytest.mark.slow
def test_a_hundred_kills_while_snapshots_are_written(tmp_path: Path) -> None:
    kill_while_writing(tmp_path, 100)


def use_for_a_while(folder: Path, seed: int, failed) -> None:
    draw = random.Random(seed)
    device = Device(num_pages=100, directory=folder, disk_bytes=40_000)
    for _ in range(60):
        tokens = [*text(draw.choice([8, 20, 33]), draw.randrange(3)), *text(draw.randrange(1, 9), draw.randrange(4))]
        request = device.request(tokens)
        request.resume()
        request.read(len(tokens))
        if not same(request.content(), Device().remember(tokens)):
            failed.set()
        request.add()
        request.end()
        if draw.random() < 0.3:
            device.cache.free(device.pages.num_pages - 1)
    device.cache.close()
    device.check()


def test_processes_on_one_folder_with_little_room(tmp_path: Path) -> None:
    """Each writes, reads, and deletes what the others may be using."""
    fork = multiprocessing.get_context("fork")
    failed = fork.Event()
    processes = [fork.Process(target=use_for_a_while, args=(tmp_path, seed, failed)) for seed in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert not failed.is_set()
    assert sum(os.path.getsize(file) for file in files(tmp_path)) < 41_000
