"""Logits into losses and gradients, in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def to_gradient(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, gradient: bool) -> None:
    """losses [M] = logsumexp(logits) - logits[target] of each row, in losses' dtype; NaN for a target outside 0..V-1.

    With `gradient`, logits [M, V] become d loss / d logits = softmax(logits) - one_hot(target).
    """
    log_probs = F.log_softmax(logits, dim=-1, dtype=losses.dtype)
    targets = targets.long()[:, None]
    inside = (targets >= 0) & (targets < logits.shape[1])  # a gather outside would end a GPU's context
    column = targets.clamp(0, logits.shape[1] - 1)
    losses.copy_(-log_probs.gather(1, column).masked_fill(~inside, torch.nan).squeeze(1))
    if gradient:
        logits.copy_(log_probs.exp_().scatter_add_(1, column, -inside.to(losses.dtype)))
