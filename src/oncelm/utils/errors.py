"""Errors that teach: what was given, what is allowed, the nearest valid choice."""

from __future__ import annotations

import difflib
import errno
import re
import reprlib
from collections.abc import Iterable
from numbers import Integral

LONGEST_SHOWN = 200  # characters
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother, _REPR.maxlong = 3, 120, 120, 40

# of torch, on a GPU and on a CPU, and of safetensors
_OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|not enough memory|os error 12\b")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, of Python or a library, says that memory ran out."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    from safetensors import SafetensorError  # here: every start of the command imports this module

    return isinstance(error, RuntimeError | OSError | SafetensorError) and bool(_OUT_OF_MEMORY.search(str(error)))


def shown(value: object) -> str:
    """A value as errors show it: in one line, however long, deep or wide it is.

    >>> shown([1.5, "eight"])
    "[1.5, 'eight']"
    """
    try:
        text = _REPR.repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return f"a {type(value).__name__} of thousands of digits"
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def printable(name: str) -> str:
    """A name out of somebody's file, in one line.

    >>> printable("text"), printable("te\\nxt")
    ('text', "'te\\\\nxt'")
    """
    return name if name.isprintable() else repr(name)


def unknown(kind: str, value: object, allowed: Iterable[object]) -> ValueError:
    """The error for a value outside a known set, with the nearest valid choice.

    >>> str(unknown("backend", "chunck", ["chunk", "naive"]))
    "unknown backend 'chunck'; did you mean 'chunk'? Allowed: chunk, naive."
    """
    names = [str(name) for name in allowed]
    text = str(value)
    near = nearest(text, names, 0.5) if isinstance(value, str) or len(text) <= 40 else None
    hint = f" did you mean {near!r}?" if near else ""
    return ValueError(f"unknown {kind} {shown(value)};{hint} Allowed: {', '.join(names)}.")


def renamed(kind: str, old: str, new: str) -> ValueError:
    """The error for a name of an earlier version.

    >>> str(renamed("setting", "packing", "crossbatch_rows"))
    "setting 'packing' is now called 'crossbatch_rows'."
    """
    return ValueError(f"{kind} {old!r} is now called {new!r}.")


def nearest(name: str, names: Iterable[str], likeness: float) -> str | None:
    """The one of `names` that is most like `name`, from 0 (nothing in common) to 1; None if none is so like it.

    >>> nearest("windw_size", ["hidden_size", "window_size"], 0.75)
    'window_size'
    """
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=likeness)
    return close[0] if close else None


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
