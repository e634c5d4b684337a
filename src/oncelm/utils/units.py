"""Quantities as text."""

from __future__ import annotations


def size(num_bytes: int) -> str:
    """Bytes as KiB, MiB or GiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:,.1f} {unit}"
    return f"{num_bytes / 2**10:,.1f} KiB"
