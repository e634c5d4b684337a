"""The loss of a language model's last layer without the [tokens, vocabulary] matrix of logits.

Rows are taken a few at a time: their logits are made, turned into loss and gradients at once, and dropped. Memory is
one block of logits plus the gradients, whatever the number of tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

BLOCK_ELEMENTS = 1 << 24  # logits alive at a time: 64 MiB in float32


def linear_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over rows of the cross-entropy of `hidden @ weight.T`.

    Args:
        hidden: [M, d].
        weight: [V, d].
        targets: [M] integers in 0..V-1; drop ignored rows before the call.

    Returns:
        The summed loss, a float32 scalar (float64 for float64 inputs); divide by M for the mean.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden [M, d] and weight [V, d] do not fit: {tuple(hidden.shape)}, {tuple(weight.shape)}.")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [M] = [{hidden.shape[0]}], got {tuple(targets.shape)}.")
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    return _LinearCrossEntropy.apply(hidden, weight, targets)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        loss = hidden.new_zeros((), dtype=wide)
        rows = max(1, BLOCK_ELEMENTS // weight.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, hidden.shape[0], rows):
                h, t = hidden[start : start + rows], targets[start : start + rows]
                log_probs = F.log_softmax((h @ weight.T).to(wide), dim=-1)
                loss += F.nll_loss(log_probs, t, reduction="sum")
                if not (needs_hidden or needs_weight):
                    continue
                # d loss / d logits = softmax - one_hot
                grad = log_probs.exp_()
                grad[torch.arange(len(t), device=t.device), t] -= 1.0
                grad = grad.to(h.dtype)
                if grad_hidden is not None:
                    torch.mm(grad, weight, out=grad_hidden[start : start + rows])
                if grad_weight is not None:
                    grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else (grad_hidden * grad_output).to(hidden_dtype),
            None if grad_weight is None else (grad_weight * grad_output).to(weight_dtype),
            None,
        )
