"""RMS normalisation (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Normalise the last dimension of x [..., D]; weight [D] or None. Sums are float32 inside, the result x's dtype."""
    # torch has a kernel for one dtype only; in mixed precision, weights are narrower or wider than the residual stream
    return F.rms_norm(x, (x.shape[-1],), None if weight is None else weight.to(x.dtype), eps)
