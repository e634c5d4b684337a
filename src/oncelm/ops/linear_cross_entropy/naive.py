"""Logits into losses and gradients, in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def to_gradient(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, gradient: bool) -> None:
    """losses [M] = logsumexp(logits) - logits[target] of each row, in losses' dtype.

    With `gradient`, logits [M, V] become d loss / d logits = softmax(logits) - one_hot(target).
    """
    log_probs = F.log_softmax(logits, dim=-1, dtype=losses.dtype)
    losses.copy_(F.nll_loss(log_probs, targets, reduction="none"))
    if gradient:
        probs = log_probs.exp_()
        probs[torch.arange(len(targets), device=targets.device), targets] -= 1.0
        logits.copy_(probs)
