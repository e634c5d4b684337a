"""SwiGLU (arXiv 2002.05202): silu(x) * gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def swiglu(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """silu(x) * gate, elementwise; both of one shape."""
    return F.silu(x) * gate
