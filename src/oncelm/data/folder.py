"""Which files are in a folder, links followed, and the names of those that are left out."""

from __future__ import annotations

import errno
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from oncelm.data.shards import MANIFEST

OWN = ".oncelm"  # where prepared tokens are kept beside the text
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_SHOWN = 3  # names of what is left out for one reason


@dataclass(frozen=True)
class LeftOut:
    """A file or folder that is not read, and why, as it stands behind a number: "3 hidden"."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Listing:
    """The files of a folder that are read, sorted, and what is not."""

    root: Path
    files: tuple[Path, ...]
    left_out: tuple[LeftOut, ...] = ()

    def describe(self) -> str:
        """What is left out, in a line; "" where nothing is."""
        by_reason: dict[str, list[str]] = defaultdict(list)
        for one in self.left_out:
            by_reason[one.reason].append(os.path.relpath(one.path, self.root))
        reasons = []
        for reason, names in sorted(by_reason.items()):
            more = ", ..." if len(names) > _SHOWN else ""
            reasons.append(f"{len(names):,} {reason} ({', '.join(names[:_SHOWN])}{more})")
        return f"left out of {self.root}: {'; '.join(reasons)}" if reasons else ""


def list_folder(root: Path, suffixes: tuple[str, ...]) -> Listing:
    """The files below `root` whose names end in one of `suffixes`.

    Links are followed. A folder is read once, under its own name if it lies below `root`; a link to a folder around
    the root is not followed.

    Raises:
        OSError: the root cannot be read.
    """
    files: list[Path] = []
    left_out: list[LeftOut] = []
    top, seen = root.resolve(), set[Path]()
    folders, links = [root], list[Path]()
    while folders or links:
        folder = folders.pop() if folders else links.pop()
        real = folder.resolve()
        if real in seen or (folder != root and top.is_relative_to(real)):
            left_out.append(LeftOut(folder, "linked folders that are read elsewhere or lead back"))
            continue
        seen.add(real)
        try:
            entries = [entry for entry in os.scandir(folder) if entry.name != OWN]
        except OSError as error:
            if folder == root:
                raise
            left_out.append(LeftOut(folder, f"that cannot be read ({error.strerror})"))
            continue
        if folder != root and any(entry.name == MANIFEST for entry in entries):
            left_out.append(LeftOut(folder, "of prepared tokens"))
            continue
        for entry in sorted(entries, key=lambda entry: entry.name, reverse=True):  # the first is taken first
            path = folder / entry.name
            if reason := _why_left_out(entry, suffixes):
                left_out.append(LeftOut(path, reason))
            elif entry.is_file():
                files.append(path)
            else:
                (links if entry.is_symlink() else folders).append(path)
    return Listing(root, tuple(sorted(files)), tuple(sorted(left_out, key=lambda one: one.path)))


def _why_left_out(entry: os.DirEntry[str], suffixes: tuple[str, ...]) -> str | None:
    """Why something in a folder is neither gone into nor read; None where it is."""
    if entry.name.startswith("."):
        return "hidden"
    try:
        is_folder, is_file = entry.is_dir(), entry.is_file()
    except OSError:  # links in a circle
        is_folder = is_file = False
    if is_folder:
        return None
    if is_file and entry.name.endswith(suffixes):
        readable = os.access(entry.path, os.R_OK, effective_ids=os.access in os.supports_effective_ids)
        return None if readable else f"that cannot be read ({os.strerror(errno.EACCES)})"
    if is_file:
        return f"with the suffix {_suffix(entry.name)}" if _suffix(entry.name) else "without a suffix"
    return "links to nothing" if entry.is_symlink() else "that are no files"


def _suffix(name: str) -> str:
    stem, last = os.path.splitext(name)
    return os.path.splitext(stem)[1] + last if last in _COMPRESSED else last
