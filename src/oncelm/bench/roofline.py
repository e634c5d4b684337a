"""The ceilings of this machine, measured, and the least time that they allow a piece of work."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from oncelm.bench.measure import measure
from oncelm.models.work import Work

# [M, K] x [K, N] of the linear layers tried, and the bytes copied, which no cache holds
LINEAR_SHAPES = {"cpu": ((2048, 2048, 2048), (8192, 1536, 512)), "cuda": ((8192, 8192, 8192), (16384, 4096, 4096))}
COPY_BYTES = {"cpu": 1 << 29, "cuda": 1 << 31}
REPEATS = 8


@dataclass(frozen=True)
class Ceilings:
    """The fastest that this machine was seen to compute and to move."""

    flops_per_second: float
    bytes_per_second: float

    def floor_seconds(self, work: Work) -> float:
        """The least time for `work`: at best, computing and moving overlap."""
        return max(work.flops / self.flops_per_second, work.bytes / self.bytes_per_second)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The fastest repeat of a linear layer in `dtype` (the best shape) and of a large copy (bytes read and written)."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    flops_per_second = 0.0
    for M, K, N in LINEAR_SHAPES[kind]:
        x, weight = torch.randn(M, K, device=device).to(dtype), torch.randn(N, K, device=device).to(dtype)
        timing = measure(functools.partial(F.linear, x, weight), REPEATS, device)
        flops_per_second = max(flops_per_second, 2 * M * K * N / min(timing.runs))
    source = torch.ones(COPY_BYTES[kind], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), REPEATS, device)
    return Ceilings(flops_per_second, 2 * source.nbytes / min(timing.runs))
