"""Tables on a screen or in a pipe."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

PIPE_WIDTH = 1_000  # columns: no table is cut for a file or another program


def print_tables(*tables: Table) -> None:
    """On a terminal as wide as it is; anywhere else whole ($COLUMNS counts in both)."""
    from rich.console import Console

    whole = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    Console(width=PIPE_WIDTH if whole else None).print(*tables)
