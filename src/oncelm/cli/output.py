"""What the verbs share about output: tables on a screen or in a pipe, and places that can be written."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

PIPE_WIDTH = 1_000  # columns: no table is cut for a file or another program


def print_tables(*tables: Table) -> None:
    """On a terminal as wide as it is; anywhere else whole ($COLUMNS counts in both)."""
    from rich.console import Console

    whole = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    Console(width=PIPE_WIDTH if whole else None).print(*tables)


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
