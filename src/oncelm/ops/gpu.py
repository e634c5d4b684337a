"""What kernels ask of the GPU that they are launched on."""

from __future__ import annotations

import contextlib
from functools import cache

import torch


def on(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Within, launches go to the tensor's GPU, whichever is current. Elsewhere (Triton's interpreter) nothing to do."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@cache
def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of the GPU of that index; None means the current one."""
    return torch.cuda.get_device_capability(index)


@cache
def multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count
