"""The definition, one token at a time. The reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def by_token(x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """y_t = silu(sum of the window's W inputs, each times its tap); the window is the state and x_t."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    taps = weight.mT.to(dtype)  # [W, D]
    outputs = []
    for t in range(x.shape[1]):
        window = torch.cat((state, x[:, t : t + 1]), dim=1)  # [B, W, D]
        outputs.append(F.silu((window.to(dtype) * taps).sum(1)))
        state = window[:, 1:]
    return torch.stack(outputs, dim=1) if outputs else x, state
