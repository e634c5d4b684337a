"""What lies in a folder: read once, behind links too, or left out by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from oncelm.data.folder import list_folder


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("text")


def read(root: Path) -> list[str]:
    return [os.path.relpath(file, root) for file in list_folder(root, (".txt",)).files]


def left_out(root: Path) -> dict[str, str]:
    return {os.path.relpath(one.path, root): one.reason for one in list_folder(root, (".txt",)).left_out}


def test_linked_folders_and_files_are_read_under_the_links_names(tmp_path) -> None:
    make(tmp_path, "disk2/b.txt", "disk2/deep/c.txt", "data/a.txt", "blobs/0f")
    (tmp_path / "data" / "more").symlink_to("../disk2")
    (tmp_path / "data" / "d.txt").symlink_to("../blobs/0f")
    (tmp_path / "linked").symlink_to("data")
    for root in (tmp_path / "data", tmp_path / "linked"):
        assert read(root) == ["a.txt", "d.txt", "more/b.txt", "more/deep/c.txt"]
        assert left_out(root) == {}
    assert list_folder(tmp_path / "data", (".txt",)).describe() == ""


def test_a_folder_is_read_once_and_links_never_lead_in_circles(tmp_path) -> None:
    make(tmp_path, "data/a.txt", "data/sub/b.txt", "other/c.txt", "beside.txt")
    links = {"data/sub/up": "..", "data/0": "sub", "data/out": "../..", "data/x": "../other", "data/y": "../other"}
    for name, target in {**links, "other/back": "../data", "data/self": "self", "data/gone.txt": "nothing"}.items():
        (tmp_path / name).symlink_to(target)
    assert read(tmp_path / "data") == ["a.txt", "sub/b.txt", "x/c.txt"]
    again = "linked folders that are read elsewhere or lead back"
    assert left_out(tmp_path / "data") == {
        **dict.fromkeys(["0", "out", "sub/up", "x/back", "y"], again),
        **dict.fromkeys(["self", "gone.txt"], "links to nothing"),
    }


def test_all_that_is_not_read_is_counted_and_named(tmp_path) -> None:
    make(tmp_path, "a.txt", "README.md", "b/c.md", "d.md", "e.md", "f.txt.gz", "g.tar.gz", "LICENSE", "H.TXT")
    make(tmp_path, ".git/config", ".hidden.txt", ".oncelm/ab/tokens.json", ".oncelm/x.txt", "tokens/tokens.json")
    make(tmp_path, "tokens/shards/x.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    listing = list_folder(tmp_path, (".txt",))
    assert listing.files == (tmp_path / "a.txt",)
    assert listing.describe() == (
        f"left out of {tmp_path}: 2 hidden (.git, .hidden.txt); 1 of prepared tokens (tokens); "
        "1 that are no files (pipe.txt); 1 with the suffix .TXT (H.TXT); 4 with the suffix .md (README.md, b/c.md, "
        "d.md, ...); 1 with the suffix .tar.gz (g.tar.gz); 1 with the suffix .txt.gz (f.txt.gz); "
        "1 without a suffix (LICENSE)"
    )


def test_what_cannot_be_read_is_named(public_folder, permissions) -> None:
    make(public_folder, "b.txt", "secret/c.txt")
    (public_folder / "b.txt").chmod(0o000)
    (public_folder / "secret").chmod(0o000)
    with permissions():
        assert read(public_folder) == ["a.txt"]
        reason = "that cannot be read (Permission denied)"
        assert left_out(public_folder) == {"b.txt": reason, "secret": reason}
        with pytest.raises(PermissionError):
            list_folder(public_folder / "secret", (".txt",))
