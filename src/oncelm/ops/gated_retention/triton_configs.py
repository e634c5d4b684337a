"""How each kernel of gated retention is compiled on which GPU, from the sweep of benchmarks/gpu_gated_retention.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from oncelm.ops import gpu

hopper: Any
try:
    from oncelm.ops.gated_retention import hopper
except ImportError:  # a Triton without Gluon
    hopper = None

Tensor = torch.Tensor


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled: tokens a chunk, columns of the state a program, warps, pipeline stages.

    0 stages: it is a kernel of hopper.py, which orders its copies itself; there a warp has 16 columns.
    """

    chunk: int
    block: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int]:
        if not self.num_stages:
            return {"BLOCK": self.block, "num_warps": self.num_warps}
        return {"BLOCK": self.block, "C": self.chunk, "num_warps": self.num_warps, "num_stages": self.num_stages}


# (kernel, largest of K and V) -> Config for 16-bit inputs, from the sweep of benchmarks/gpu_gated_retention.py (H100)
CONFIGS = {
    ("states", 64): Config(64, 64, 4, 3),
    ("states", 128): Config(64, 128, 4, 3),
    ("states", 256): Config(64, 128, 8, 3),
    ("forward", 64): Config(64, 64, 4, 3),
    ("forward", 128): Config(64, 64, 4, 2),
    ("forward", 256): Config(64, 32, 4, 3),
    ("key_value", 64): Config(64, 64, 4, 2),
    ("key_value", 128): Config(64, 64, 4, 1),
    ("key_value", 256): Config(64, 64, 8, 2),
    ("query", 64): Config(64, 64, 4, 2),
    ("query", 128): Config(64, 64, 4, 2),
    ("query", 256): Config(64, 64, 8, 2),
}
# (kernel, largest of K and V) -> columns of the state a program, for the kernels of hopper.py
HOPPER_BLOCKS = {
    ("forward", 64): 64,
    ("forward", 128): 64,
    ("forward", 256): 128,
    ("key_value", 64): 64,
    ("key_value", 128): 64,
    ("key_value", 256): 128,
    ("query", 64): 64,
    ("query", 128): 64,
    ("query", 256): 128,
}
FULL_PRECISION = Config(16, 16, 8, 1)  # float32 runs on the vector units, operands in registers: small tiles

# Tokens between two stored gradients of the state (the marks), for 16-bit inputs. Rounding adds up over a group, so
# dg's error grows with the root of its length (plain PyTorch's is that of groups of 64); the marks of shorter groups
# cost memory, K V / group elements a token, and in the commonest shape, where both are 128, time.
GROUP, GROUP_128 = 128, 256
FULL_PRECISION_GROUP = 64


def on_hopper(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels of hopper.py take these inputs."""
    if hopper is None or not q.is_cuda or q.dtype == torch.float32 or min(q.shape[-1], v.shape[-1]) < 64:
        return False
    return gpu.capability(q.device.index)[0] == 9


def config(kernel: str, q: Tensor, v: Tensor) -> Config:
    """The compiled form of `kernel` for these inputs; its block divides both K and V."""
    K, V = q.shape[-1], v.shape[-1]
    if kernel != "states" and on_hopper(q, v):
        block = min(HOPPER_BLOCKS[kernel, max(K, V)], K, V)
        return Config(hopper.CHUNK, block, block // 16, 0)
    found = FULL_PRECISION if q.dtype == torch.float32 else CONFIGS[kernel, max(64, K, V)]
    block, stages = min(found.block, K, V), found.num_stages
    if block < found.block:
        stages = max(2, stages)  # Triton 3.6 miscompiles 16-bit blocks of 32 columns in one stage (docs/performance.md)
    return Config(found.chunk, block, found.num_warps, stages)


def group_size(q: Tensor, v: Tensor) -> int:
    """Tokens between two marks."""
    if q.dtype == torch.float32:
        return FULL_PRECISION_GROUP
    return GROUP_128 if q.shape[-1] == v.shape[-1] == 128 else GROUP
