"""Errors that teach: what was given, what is allowed, the nearest valid choice."""

from __future__ import annotations

import difflib
import errno
import re
from collections.abc import Iterable
from numbers import Integral

from safetensors import SafetensorError

# of torch, on a GPU and on a CPU, and of safetensors
_OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|not enough memory|os error 12\b")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of Python or a library, says that memory ran out."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | OSError | SafetensorError) and bool(_OUT_OF_MEMORY.search(str(error)))


def unknown(kind: str, value: object, allowed: Iterable[object]) -> ValueError:
    """The error for a value outside a known set, with the nearest valid choice.

    >>> str(unknown("backend", "chunck", ["chunk", "naive"]))
    "unknown backend 'chunck'; did you mean 'chunk'? Allowed: chunk, naive."
    """
    names = [str(name) for name in allowed]
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" did you mean {close[0]!r}?" if close else ""
    return ValueError(f"unknown {kind} {str(value)!r};{hint} Allowed: {', '.join(names)}.")


def check_choice(kind: str, value: object, allowed: Iterable[object]) -> None:
    """Raise `unknown(...)` unless `value` is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise unknown(kind, value, allowed)


def check_positive(**values: int | float) -> None:
    """Raise ValueError naming the first argument that is not a number above zero."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{name} must be a number above 0, got {value!r}.")


def check_whole(at_least: int, **values: object) -> None:
    """Raise ValueError naming the first argument that is not a whole number of at least `at_least`.

    >>> check_whole(1, top_k=0)
    Traceback (most recent call last):
    ValueError: top_k must be a whole number of at least 1, got 0.
    """
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < at_least:
            raise ValueError(f"{name} must be a whole number of at least {at_least}, got {value!r}.")
