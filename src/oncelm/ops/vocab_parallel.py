"""The loss of a language model's last layer whose weight is split by vocabulary over several ranks.

Each rank makes the logits of its own entries only. Of a block of rows the ranks exchange three numbers a row: the
largest logit, the sum of exponentials, and the target's logit.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from oncelm.ops.linear_cross_entropy import check_range, check_shapes

BLOCK_ELEMENTS = 1 << 24  # logits alive at a time on a rank: 64 MiB in float32


def vocab_parallel_cross_entropy(hidden: Tensor, weight: DTensor, targets: Tensor) -> Tensor:
    """What `linear_cross_entropy` computes, for a weight that is split by rows.

    Args:
        hidden: [M, d], the same on all ranks.
        weight: [V, d], Shard(0) over a one-dimensional mesh.
        targets: [M] integers in 0..V-1, the same on all ranks. Others are refused on a CPU and make the loss NaN
            elsewhere, as in `linear_cross_entropy`.

    Returns:
        The summed loss, a float32 scalar (float64 for float64 inputs), the same on all ranks.
    """
    if tuple(weight.placements) != (Shard(0),):
        raise ValueError(f"weight must be split by rows over one axis of a mesh, got {weight.placements}.")
    check_shapes(hidden, weight, targets)
    check_range(targets, weight.shape[0])
    group = weight.device_mesh.get_group()
    ranks = dist.get_world_size(group)
    own_rows = -(-weight.shape[0] // ranks)  # of the first ranks; DTensor gives the last ones fewer
    if own_rows * (ranks - 1) >= weight.shape[0]:
        raise ValueError(f"a vocabulary of {weight.shape[0]} leaves some of {ranks} ranks without an entry.")
    local = weight.to_local()
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    else:
        dtype = torch.promote_types(hidden.dtype, local.dtype)
    hidden, local = hidden.to(dtype), local.to(dtype)
    first = dist.get_rank(group) * own_rows
    needs_gradients = torch.is_grad_enabled() and (hidden.requires_grad or local.requires_grad)
    inside = (targets >= 0) & (targets < weight.shape[0])  # otherwise it is no rank's
    return _VocabParallelCrossEntropy.apply(hidden, local, targets.long() - first, inside, group, needs_gradients)


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, inside, group, needs_gradients):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.empty_like(hidden, dtype=wide)
        grad_weight = torch.zeros_like(weight, dtype=wide)
        loss = hidden.new_zeros((), dtype=wide)
        rows = max(1, BLOCK_ELEMENTS // weight.shape[0])
        with torch.autocast(hidden.device.type, enabled=False):
            for h, t, good, grad_h in zip(
                *(x.split(rows) for x in (hidden, targets, inside, grad_hidden)), strict=True
            ):
                logits = (h @ weight.T).to(wide)
                top = logits.amax(1, keepdim=True)
                dist.all_reduce(top, dist.ReduceOp.MAX, group=group)
                logits -= top
                own = ((t >= 0) & (t < weight.shape[0])).to(wide)[:, None]  # 1 where the target is here
                column = t.clamp(0, weight.shape[0] - 1)[:, None]
                picked = logits.gather(1, column) * own
                exponentials = logits.exp_()
                sums = torch.cat((exponentials.sum(1, keepdim=True), picked), dim=1)
                dist.all_reduce(sums, group=group)
                loss += (sums[:, 0].log() - sums[:, 1]).masked_fill(~good, torch.nan).sum()
                if needs_gradients:  # d loss / d logits = softmax - one_hot
                    grad = exponentials.div_(sums[:, :1]).scatter_add_(1, column, -own).to(h.dtype)
                    grad_h.copy_(grad @ weight)
                    grad_weight += grad.T @ h
        if needs_gradients:
            dist.all_reduce(grad_hidden, group=group)
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad_output):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_output, grad_weight * grad_output, None, None, None, None
