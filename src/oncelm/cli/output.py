"""Tables on a screen or in a pipe."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

PIPE_WIDTH = 1_000  # columns: no table is cut for a file or another program


def new_table(title: str, *columns: str) -> Table:
    """A table with a title and, if `columns` are named, a header; columns after "|" are numbers, set to the right."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, min_width=len(title))
    table.show_header = bool(columns)
    for column in columns:
        table.add_column(column.lstrip("|"), justify="right" if column.startswith("|") else "left")
    return table


def print_tables(*tables: Table) -> None:
    """On a terminal as wide as it is; anywhere else whole ($COLUMNS counts in both)."""
    from rich.console import Console

    whole = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    Console(width=PIPE_WIDTH if whole else None).print(*tables)
