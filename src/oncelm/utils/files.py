"""Writing files so that a crash at any moment leaves the old file or the new one, never half of either.

What is being written lies in a hidden folder beside its place until it is complete:

    .NAME.0123456789abcdef.tmp/
        lock    locked as long as the writing process lives
        new     the file or folder to be
        old     the folder that it replaces, where the two cannot change places at once

The lock tells what a killed process left from what is being written, by this host or by another that shares the
folder. Where a disk knows no locks, leftovers stay; where each host has locks of its own on a shared disk, two hosts
must not write one name at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

# of such a folder; earlier versions wrote NAME's successor there itself, and moved an old folder to `.old`
_UNFINISHED = re.compile(r"\.(.+)\.[0-9a-f]{16}\.(tmp|old)")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2
_CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)  # the kernel, or the disk
# how the writers of safetensors and torch.save tell of an error of the disk
_FAILED_WRITE = re.compile(r"os error \d+|inline_container|PytorchStreamWriter|cannot be opened")


def check_place(path: str | os.PathLike[str], option: str) -> None:
    """ValueError, before hours of work, where neither `path` nor a folder on the way to it could be written.

    Nothing is made or changed.
    """
    target = Path(path).absolute()
    existing = next(place for place in (target, *target.parents) if os.path.lexists(place))
    if existing != target and not existing.is_dir():
        reason = f"{existing} is a file"
    elif not os.access(existing, os.W_OK | (os.X_OK if existing.is_dir() else 0)):
        reason = f"{existing} is read-only for this user"
    else:
        return
    raise ValueError(f"{path} cannot be written: {reason}; name another place with {option}.")


def cache_folder() -> Path:
    """Where the platform has what programs keep and could make again; OnceLM's part of it."""
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or usual).expanduser() / "oncelm"


def fsync_path(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path on the same disk; on success it is fsynced and renamed to `path`.

    On any error (a full disk too) the temporary file is removed and `path` stays as it was. What killed processes left
    of the same name is removed first.

    Raises:
        ValueError: `path` is there and no file: a folder, a device, a pipe.
        OSError: it cannot be written; other errors than those of writing stay what they are.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise ValueError(f"{target} is there and no file; name another.")
    with _place_beside(target) as place:
        new = place / "new"
        new.touch()
        yield new
        _settle(new, place)
        new.replace(target)
        fsync_path(target.parent)


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` as JSON; errors as those of `atomic_file`."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary folder on the same disk; on success its files are fsynced and it takes `path`'s place.

    An existing `path` changes places with it at once, and is removed then. On disks where that cannot be done (NFS) a
    kill within may leave no `path` for a while: `bring_back`, `clean_up` and the next `atomic_folder` put it back.
    On any error the temporary folder is removed and `path` stays as it was.

    Raises:
        ValueError: `path` is there and no folder.
        OSError: it cannot be written; other errors than those of writing stay what they are.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is there and no folder; name another.")
    with _place_beside(target) as place:
        new = place / "new"
        new.mkdir()
        yield new
        for file in sorted(new.rglob("*")):
            _settle(file, place)
        fsync_path(new)
        _take_place(new, target, place / "old")
        fsync_path(target.parent)


def bring_back(path: str | os.PathLike[str]) -> None:
    """Where `path` is not there because a process was killed while it replaced that folder, put the old one back."""
    target = Path(path)
    if not target.exists():
        for left in _leftovers(target):
            _clear(left, target, wait=True)


def clean_up(folder: Path) -> None:
    """Clear away what killed processes left in `folder`; a folder that was being replaced comes back."""
    for path in list(folder.iterdir()) if folder.is_dir() else ():
        if match := _UNFINISHED.fullmatch(path.name):
            _clear(path, folder / match[1], wait=False)


# -- the place beside -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _place_beside(target: Path) -> Iterator[Path]:
    """A new locked folder beside `target`, which goes at the end; a failed write within is an error that names both."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in _leftovers(target):
        _clear(left, target, wait=False)
    place = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    with _write_errors(target, place):
        place.mkdir()
        with _held(place, wait=True) as held:
            if not (held or place.is_dir()):
                raise FileNotFoundError(errno.ENOENT, "cleared away by another process", str(place))
            try:
                yield place
            finally:
                _put_back(place / "old", target)
                shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _held(place: Path, wait: bool) -> Iterator[bool]:
    """Hold the lock of such a folder; False where another process does, it is gone, or its disk has no locks."""
    descriptor, held = -1, False
    with contextlib.suppress(OSError):
        descriptor = os.open(place / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        held = os.path.samestat(os.fstat(descriptor), os.stat(place / "lock"))
    try:
        yield held
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _settle(path: Path, place: Path) -> None:
    """Flush what was written, and let those read it who may read any new file; safetensors lets its owner alone."""
    usual = (place / "lock").stat().st_mode
    if path.is_file() and path.stat().st_mode != usual:
        path.chmod(usual & 0o777)
    fsync_path(path)


def _take_place(new: Path, target: Path, old: Path) -> None:
    """Rename the folder `new` to `target`; a folder that is there goes to `new`, or to `old`."""
    try:
        new.replace(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):  # the last one: a link to a folder
            raise
        if not _exchange(new, target):
            target.replace(old)
            new.replace(target)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change places at once; False where that cannot be done."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # Linux has it
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in _CANNOT_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


# -- what killed processes left ---------------------------------------------------------------------------------------


def _leftovers(target: Path) -> list[Path]:
    """What was or is being written beside `target` to take its place."""
    try:
        paths = list(target.parent.iterdir())
    except OSError:  # no such folder, or one that may not be listed
        return []
    matches = ((path, _UNFINISHED.fullmatch(path.name)) for path in paths)
    return [path for path, match in matches if match and match[1] == target.name]


def _clear(left: Path, target: Path, wait: bool) -> None:
    """Remove a leftover that no living process holds; a folder on which it was about to put a new one comes back.

    What may not be changed here (a folder of somebody else's) stays.

    Args:
        wait: for the process that holds it to end with it.
    """
    with contextlib.suppress(OSError):
        if left.suffix == ".old":
            _put_back(left, target)
        if left.is_symlink() or not left.is_dir():
            left.unlink(missing_ok=True)
            return
        with _held(left, wait) as held:
            if held:
                _put_back(left / "old", target)
                shutil.rmtree(left, ignore_errors=True)


def _put_back(old: Path, target: Path) -> None:
    if old.exists() and not target.exists():
        old.replace(target)


# -- errors -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _write_errors(target: Path, place: Path) -> Iterator[None]:
    """A failed write in `place` as an OSError that names `target` and the space left; other errors as they are."""
    try:
        yield
    except Exception as error:
        from safetensors import SafetensorError  # here: every start of the command imports this module

        if not (isinstance(error, OSError | SafetensorError | RuntimeError) and _is_failed_write(error, place)):
            raise
        free = shutil.disk_usage(target.parent).free / 2**20
        reason = " ".join(str(error).split())
        raise OSError(f"cannot write {target} ({free:,.0f} MiB free there): {reason}") from error


def _is_failed_write(error: Exception, place: Path) -> bool:
    if not isinstance(error, OSError):
        return bool(_FAILED_WRITE.search(str(error)))
    if error.filename is not None:
        names = (Path(str(name)).absolute() for name in (error.filename, error.filename2))
        return any(name.is_relative_to(place.absolute()) for name in names)
    return type(error) is OSError  # a lost connection, an interrupt and the like are of subclasses
