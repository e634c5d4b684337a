"""A lock: one run at a time may write to a run's folder."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout


def run_lock(out: Path) -> FileLock:
    return FileLock(out / ".lock")


def claim(lock: FileLock) -> None:
    """Be the only run that writes to its folder, which another would take for what a killed one left.

    Raises:
        ValueError: another run does.
    """
    out = Path(lock.lock_file).parent
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"out {str(out)!r} is being written by another run; wait for its end, choose another folder or, "
            f"where there is none, delete {lock.lock_file}."
        ) from None
