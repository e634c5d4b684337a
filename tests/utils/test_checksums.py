"""Checksums of folders: written, read by other tools, and every kind of damage named."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from oncelm.utils.checksums import MANIFEST, SUMS, check_folder, checksums, find_damage, write_checksums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    for name, text in (("config.json", "{}"), ("weights", "0123"), ("sub/a b", "")):
        (tmp_path / name).write_text(text)
    write_checksums(tmp_path)
    return tmp_path


@pytest.fixture
def checkpoint(folder: Path) -> Path:
    (folder / SUMS).unlink()
    (folder / "trainer.json").write_text("{}")
    manifest = {"step": 3, "files": checksums(folder)}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return Path(shutil.copytree(folder, folder / "step-000003"))


def test_a_whole_folder(folder: Path) -> None:
    assert check_folder(folder) == 3
    (folder / "README.md").write_text("mine")
    assert check_folder(folder) == 3


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs sha256sum")
def test_sha256sum_reads_them(folder: Path) -> None:
    check = ["sha256sum", "--check", "--strict", "--quiet", SUMS]
    assert subprocess.run(check, cwd=folder, check=False).returncode == 0
    (folder / "weights").write_text("0133")
    assert subprocess.run(check, cwd=folder, check=False, capture_output=True).returncode == 1


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "changed": (edit("weights", "1", "2"), "weights does not match its checksum"),
    "longer": (edit("config.json", "}", "} "), "config.json does not match its checksum"),
    "missing": (lambda f: (f / "sub" / "a b").unlink(), "sub/a b is missing"),
    "renamed": (lambda f: (f / "weights").rename(f / "Weights"), "weights is missing"),
    "added": (lambda f: (f / "extra.json").touch(), f"extra.json is not listed in {SUMS}"),
    "no list": (lambda f: (f / SUMS).unlink(), f"cannot be verified: it is no folder with checksums ({SUMS})"),
    "a list cut off": (lambda f: (f / SUMS).write_text((f / SUMS).read_text()[:-3]), f"{SUMS} cannot be read"),
    "an upper case digest": (lambda f: (f / SUMS).write_text((f / SUMS).read_text().upper()), f"{SUMS} cannot be read"),
    "no text": (lambda f: (f / SUMS).write_bytes(b"\xff"), f"{SUMS} cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(folder: Path, case: str) -> None:
    change, message = DAMAGE[case]
    change(folder)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 (the message is compared below)
        check_folder(folder)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_each_of_several_is_named(folder: Path) -> None:
    (folder / "weights").write_text("x")
    (folder / "config.json").unlink()
    assert find_damage(folder, SUMS) == {"config.json": "is missing", "weights": "does not match its checksum"}


def test_a_list_that_lost_lines_does_not_vouch_for_their_files(folder: Path) -> None:
    (folder / SUMS).write_text("".join((folder / SUMS).read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=f"config.json is not listed in {SUMS}"):
        check_folder(folder)


def test_every_flipped_bit_of_a_list_is_noticed(folder: Path) -> None:
    whole = (folder / SUMS).read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            (folder / SUMS).write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            assert find_damage(folder, SUMS)


def test_every_flipped_bit_of_a_manifest_is_noticed(checkpoint: Path) -> None:
    assert check_folder(checkpoint) == 4
    whole = (checkpoint / MANIFEST).read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            (checkpoint / MANIFEST).write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
            assert find_damage(checkpoint, MANIFEST)


def test_parts_may_be_left_out_of_a_checkpoint_but_not_damaged(checkpoint: Path) -> None:
    (checkpoint / "sub" / "a b").write_text("x")
    with pytest.raises(ValueError, match="sub/a b does not match"):
        check_folder(checkpoint, optional_parts=True)
    (checkpoint / "sub" / "a b").unlink()
    with pytest.raises(ValueError, match="sub/a b is missing"):
        check_folder(checkpoint, optional_parts=True)
    (checkpoint / "sub").rmdir()
    assert check_folder(checkpoint, optional_parts=True) == 4
    with pytest.raises(ValueError, match="sub/a b is missing"):
        check_folder(checkpoint)
