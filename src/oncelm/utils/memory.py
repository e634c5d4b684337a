"""The memory that there is, asked before much of it is taken."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable

import psutil
import torch

from oncelm.utils.units import size


def machine_memory() -> int:
    """Bytes that this process could have at most: memory and swap, or less where it is limited (`ulimit -v`)."""
    total = psutil.virtual_memory().total + psutil.swap_memory().total
    if sys.platform == "win32":
        return total
    import resource

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return total if limit == resource.RLIM_INFINITY else min(total, limit)


def check_memory(num_bytes: int, what: str, device: torch.device) -> None:
    """ValueError for `what` that cannot fit a CPU's memory, which would be eaten first; a GPU refuses by itself."""
    if device.type == "cpu" and num_bytes > machine_memory():
        raise ValueError(f"{what} would take {size(num_bytes)}; this machine has {size(machine_memory())} of memory.")


def checked_zeros(shape: Iterable[int], dtype: torch.dtype, device: torch.device, what: str) -> torch.Tensor:
    """torch.zeros; ValueError for what cannot fit."""
    shape = tuple(shape)
    check_memory(math.prod(shape) * dtype.itemsize, what, device)
    return torch.zeros(shape, dtype=dtype, device=device)
