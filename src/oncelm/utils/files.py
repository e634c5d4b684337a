"""Writing files so that a crash at any moment leaves the old file or the new one, never half of either."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{16}\.(tmp|old)")  # names that `_beside` and `atomic_folder` give


def fsync_path(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _write_errors(target: Path) -> Iterator[None]:
    """Every failed write as an OSError that names `target` and the space left.

    torch.save and safetensors report a full disk as errors of their own, in words about their insides.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        free = shutil.disk_usage(target.parent).free / 2**20
        reason = " ".join(str(error).split())
        raise OSError(f"cannot write {target} ({free:,.0f} MiB free there): {reason}") from error


def _beside(target: Path) -> Path:
    """A new name in the target's folder, which is made where it is not there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the same folder; on success it is fsynced and renamed to `path`.

    On any error (a full disk too) the temporary file is removed and `path` stays as it was.

    Raises:
        ValueError: `path` is there and no file: a folder, a device, a pipe.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise ValueError(f"{target} is there and no file; name another.")
    temporary = _beside(target)
    try:
        with _write_errors(target):
            temporary.touch(exist_ok=False)
            yield temporary
        fsync_path(temporary)
        temporary.replace(target)
        fsync_path(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as JSON; errors as those of `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success its files are fsynced and it takes `path`'s place.

    An existing `path` is moved aside first and removed last, so that one complete folder exists at any moment.
    On any error the temporary folder is removed and `path` stays as it was.
    """
    target = Path(path)
    temporary = _beside(target)
    try:
        with _write_errors(target):
            temporary.mkdir()
            yield temporary
        for file in sorted(temporary.rglob("*")):
            fsync_path(file)
        fsync_path(temporary)
        aside = temporary.with_suffix(".old")
        if target.exists():
            target.replace(aside)
        temporary.replace(target)
        fsync_path(target.parent)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clean_up(folder: Path) -> None:
    """Clear away what killed processes left in `folder`; a folder that was being replaced comes back.

    Only for the one process that writes there.
    """
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if match := _UNFINISHED.fullmatch(path.name):
            if match[2] == "old" and not (folder / match[1]).exists():
                path.replace(folder / match[1])
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
