"""Checkpoints: one folder each, complete or absent, with a checksum of every file.

    checkpoints/step-000123/
        manifest.json    {"step": ..., "files": {name: sha256}}
        ...              what `write` puts there (`saving.py`)

This file knows folders and checksums only; what a checkpoint holds is up to the `write` it is given.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from oncelm.utils.files import atomic_folder
from oncelm.utils.settings import parse_json

FOLDER = "checkpoints"  # in that of a run
MANIFEST = "manifest.json"
_HASHING_THREADS = 8
_NAME = re.compile(r"step-(\d{6,})")

logger = logging.getLogger(__name__)


def save_checkpoint(root: Path, step: int, write: Callable[[Path], None], *, keep: int) -> Path:
    """Save what `write(folder)` writes as the checkpoint of `step`, then delete all but the last `keep`.

    Nothing is deleted before the new one is complete on disk; a failure leaves every older one as it was.
    """
    target = root / f"step-{step:06d}"
    with atomic_folder(target) as folder:
        write(folder)
        manifest = {"step": step, "files": checksums(folder)}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    # A later one can only be a damaged one that the run went back behind: it must not push out good ones.
    older = [folder for number, folder in list_checkpoints(root) if number <= step]
    for folder in older[:-keep]:
        shutil.rmtree(folder)
    return target


def find_checkpoint(root: Path) -> Path | None:
    """The newest intact checkpoint, or None where there is none at all; damaged ones are warned of."""
    checkpoints = list_checkpoints(root)
    for _, folder in reversed(checkpoints):
        damage = find_damage(folder)
        if damage is None:
            return folder
        logger.warning("checkpoint %s is damaged (%s); trying the one before it", folder, damage)
    if checkpoints:
        raise ValueError(f"every checkpoint in {root} is damaged; delete that folder to start over.")
    return None


def check_new(out: Path) -> None:
    """ValueError where the folder of a new run already has checkpoints of another."""
    if list_checkpoints(out / FOLDER):
        raise ValueError(
            f"out {str(out)!r} already holds checkpoints; resume that run (--resume) or choose another folder."
        )


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of each checkpoint, oldest first, intact or not."""
    folders = root.iterdir() if root.is_dir() else ()
    named = ((_NAME.fullmatch(folder.name), folder) for folder in folders)
    return sorted((int(match[1]), folder) for match, folder in named if match)


def find_damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None when every file is as it was written."""
    try:
        expected = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        found = checksums(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
    if missing := sorted(expected.keys() - found.keys()):
        return f"{missing[0]} is missing"
    if changed := sorted(name for name, digest in expected.items() if found[name] != digest):
        return f"{changed[0]} does not match its checksum"
    return None


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below `folder` but the manifest, by relative name."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file != folder / MANIFEST]
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:  # hashing leaves Python to other threads
        digests = pool.map(_sha256, files)
        return {file.relative_to(folder).as_posix(): digest for file, digest in zip(files, digests, strict=True)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
