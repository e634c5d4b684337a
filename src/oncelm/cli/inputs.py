"""Text that the command line names or brings along, exactly as it is."""

from __future__ import annotations

import sys
from pathlib import Path


def read_text(file: str) -> str:
    """The text of a file, or of standard input for "-", exactly as it is, but for a byte order mark."""
    content = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    return _utf8(content, "standard input" if file == "-" else file).removeprefix("\ufeff")


def typed_text(text: str, option: str) -> str:
    """The text of an argument, which Python hands over as single bytes where the locale says ASCII (LC_ALL=C)."""
    return _utf8(text.encode("utf-8", "surrogateescape"), option)


def _utf8(content: bytes, name: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text: {error}") from error
