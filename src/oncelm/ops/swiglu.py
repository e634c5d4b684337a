"""SwiGLU (arXiv 2002.05202): silu(x) * gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """silu(x) * gate, elementwise; both of one shape, the result of the wider of the two dtypes."""
    activated = F.silu(x)
    # without a graph to keep, the product takes the activation's place: on a CPU a large allocation costs more than it
    in_place = not torch.is_grad_enabled() and activated.dtype == gate.dtype
    return activated.mul_(gate) if in_place else activated * gate
