"""Quantities as text."""

from __future__ import annotations


def count(number: int) -> str:
    """A number of things, short: 1,234 in full, above a hundred thousand as 0.1M."""
    return f"{number:,}" if number < 100_000 else f"{number / 1e6:,.1f}M"


def size(num_bytes: int) -> str:
    """Bytes as KiB, MiB or GiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes / 2**10:,.1f} KiB"
