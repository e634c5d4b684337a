"""Progress bars of bytes, for work that many threads share."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(name: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of bytes, as a function that threads may call; it appears after two seconds."""
    lock = threading.Lock()
    seconds = 0.1 if sys.stderr.isatty() else 30  # a log wants fewer lines
    with tqdm(total=total, desc=name, unit="B", unit_scale=True, delay=2, mininterval=seconds) as bar:

        def advance(num_bytes: int) -> None:
            with lock:
                bar.update(num_bytes)

        yield advance
