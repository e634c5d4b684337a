"""Two ways for the writing of weights to fail, as on a full disk."""

from __future__ import annotations

import contextlib
import errno
import resource
from collections.abc import Iterator
from typing import Any

import pytest
import torch


@contextlib.contextmanager
def no_space() -> Iterator[None]:
    """Writing weights fails by an error of Python's."""

    def save(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save)
        patch.setattr("transformers.modeling_utils.safe_save_file", save)
        yield


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """Writing weights fails in the writers of torch and safetensors, by a limit on the size of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
