"""Whether something can be written at a place, found out before any work is done for it."""

from __future__ import annotations

import os
from pathlib import Path


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
