"""RMSNorm as a layer, of every model."""

from __future__ import annotations

import torch
from torch import nn

from oncelm.ops import rms_norm


class RMSNorm(nn.Module):
    """RMSNorm with a learned weight [d]."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)
