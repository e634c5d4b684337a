"""What every fuzz test asks: a mistake is a ValueError or OSError of one line, soon, and takes little memory."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Iterator
from typing import Any

import psutil
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SECONDS = 30
GIB = 2  # of address space on top of what the process has
LONGEST = 6000  # characters of an error, of which a long word given may be most
DRAWS = {"suppress_health_check": list(HealthCheck), "deadline": None}


class HungError(BaseException):
    """No handler of Exception may catch it."""


def draws(count: int) -> Any:
    """A decorator: so many examples, others in every run; with CI=1 always the same."""
    return settings(max_examples=count, **DRAWS)


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Within, a teaching error is fine; any other one, much memory or much time fails the test."""

    def stop(*_: object) -> None:
        raise HungError(f"more than {SECONDS} s")

    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + GIB * 2**30, limits[1]))
    message = ""
    try:
        yield
    except (ValueError, OSError) as error:
        message = str(error).strip()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert len(message) < LONGEST, f"an error of {len(message)} characters: {message[:200]}"
    assert "\n" not in message


# -- what people and broken programs write ----------------------------------------------------------------------------

NUMBERS: list[Any] = [
    *(-1, 0, 1, 2, 3, 7, 1.5, -0.5, 1e-30, 1e9, 1e13, 1e15, 1e308, 2**31, 2**63, 2**64, 10**30, -(10**30)),
    *(float("nan"), float("inf"), float("-inf"), True, False, None),
]
WORDS = ["", "x", "</s>", "auto", "none", "float8", "int8", "nn", "1", "1e4", "../..", "a\nb", "ü漢\u202e", "\0"]
WORDS.append("x" * 3000)
SCALARS = st.sampled_from([*NUMBERS, *WORDS]) | st.integers() | st.floats() | st.text(max_size=8)
KEYS = st.text(max_size=6) | st.sampled_from(WORDS)
JUNK: st.SearchStrategy[Any] = SCALARS | st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=6,
)


DEEP = b"[" * 200_000 + b"]" * 200_000
SPLINTERS = [b"", b"NaN", b"1e999", b"9" * 5000, b"\xff", b"\0", DEEP, b"null", b"[]", b"{}"]


@st.composite
def damaged_text(draw: Any, text: str) -> bytes:
    """A text cut, with bytes replaced, doubled, or with something else in its middle."""
    raw = text.encode()
    where = draw(st.integers(0, len(raw)))
    until = draw(st.integers(where, len(raw)))
    middle = draw(st.binary(max_size=5) | st.sampled_from(SPLINTERS))
    return raw[:where] + middle + raw[until:]


@st.composite
def damaged_dict(draw: Any, original: dict[str, Any], keys: list[str], most: int = 3) -> dict[str, Any]:
    """A dictionary with one to three keys (its own, or others of `keys`) set to anything, left out or misspelt."""
    changed = dict(original)
    for _ in range(draw(st.integers(1, most))):
        key = draw(st.sampled_from(sorted({*original, *keys})) | st.text(max_size=10))
        kind = draw(st.sampled_from(["junk", "junk", "junk", "number", "number", "drop", "misspell"]))
        if kind == "drop":
            changed.pop(key, None)
        elif kind == "misspell":
            changed[key[:-1] + draw(st.sampled_from("qxs"))] = changed.pop(key, 3)
        else:
            changed[key] = draw(JUNK if kind == "junk" else st.sampled_from(NUMBERS))
    return changed
