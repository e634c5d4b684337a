"""Where the numbers of a tensor lie in memory, for kernels that cannot take them from anywhere."""

from __future__ import annotations

import torch

ALIGNMENT = 16  # bytes that attention kernels load at once


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x, or a contiguous copy where a row [..., D] does not lie side by side from a multiple of 16 bytes on.

    A kernel would end the process with "misaligned address" otherwise. Allocations themselves are aligned. Inside
    torch.compile only strides are known; its inputs are copied by inductor where they do not begin at such a multiple.
    """
    offset = 0 if torch.compiler.is_compiling() else x.storage_offset()
    places = (offset, *(stride for stride, size in zip(x.stride()[:-1], x.shape, strict=False) if size > 1))
    rows_fit = x.stride(-1) == 1 and all(place * x.itemsize % ALIGNMENT == 0 for place in places)
    if rows_fit or (x.is_contiguous() and offset * x.itemsize % ALIGNMENT == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)
