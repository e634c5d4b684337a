"""Logits into losses and gradients, in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def to_gradient(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, gradient: bool) -> None:
    """losses [M] = logsumexp(logits) - logits[target] of each row, in losses' dtype.

    With `gradient`, logits [M, V] become d loss / d logits = softmax(logits) - one_hot(target).
    """
    log_probs = F.log_softmax(logits, dim=-1, dtype=losses.dtype)
    targets = targets.long()[:, None]
    losses.copy_(-log_probs.gather(1, targets).squeeze(1))  # unlike nll_loss, it refuses -100 too
    if gradient:
        logits.copy_(log_probs.exp_().scatter_add_(1, targets, -losses.new_ones(1).expand(len(targets), 1)))
