"""The folder where tokens are kept: it must be writable, and one process at a time may write to it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from oncelm.data.folder import OWN
from oncelm.data.layout import Corpus

logger = logging.getLogger(__name__)


def hidden_folder(corpus: Corpus) -> Path:
    """Where what is prepared of a corpus is kept when nothing else is said: hidden beside the text."""
    return (corpus.path if corpus.path.is_dir() else corpus.path.parent) / OWN


def default_folder(corpus: Corpus, fingerprint: str) -> Path:
    """The folder there of the tokens of one tokenizer."""
    of_file = "" if corpus.path.is_dir() else f"{corpus.path.name}-"
    return hidden_folder(corpus) / f"{of_file}{fingerprint[:12]}"


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """While no other process prepares `folder`, which is made where it is not there.

    Raises:
        OSError: it cannot be written to.
    """
    lock = FileLock(folder / ".lock")  # may be another user's
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=2)
    except Timeout:  # an OSError too
        logger.warning("waiting for another process that prepares %s", folder)
        lock.acquire()
    except OSError as error:
        raise OSError(
            f"no place for tokens: {folder}: {error.strerror}; name one (--out of oncelm data, the setting tokens of "
            "oncelm train)."
        ) from error
    try:
        yield
    finally:
        lock.release()
