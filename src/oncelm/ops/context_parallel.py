"""Differentiable exchanges along a sequence that is cut into one contiguous chunk a rank.

Rank r of a group of C holds tokens r T to (r + 1) T. Every function here is a collective: all ranks of the group call
it, forward and backward, in the same order, so none may depend on what a rank holds.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

# torch 2.13 renamed them
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def all_chunks(x: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The ranks' x side by side along `dim`: size T there becomes C T.

    Backward sums the gradients of each rank's share and hands it back: an all-gather's reduce-scatter.
    """
    return _AllChunks.apply(x, dim, group)


def previous_tokens(x: Tensor, count: int, group: ProcessGroup) -> Tensor:
    """The `count` tokens before this rank's first one, or all there are: x [N, T, ...] -> [N, min(count, r T), ...].

    A rank hears from as many ranks before it as `count` tokens reach into: one, where its chunk is as long as that.
    Backward returns the gradients to the tokens' owners.
    """
    return _PreviousTokens.apply(x, count, group)


def state_before(update: Tensor, decay: Tensor, group: ProcessGroup) -> Tensor:
    """The state at which each rank's chunk starts, of the recurrence S' = decay * S + update over the chunks.

    All ranks know their own decay and update at once: these are gathered, a state's size from each rank, and every rank
    sums up its own start, instead of one rank waiting for the other.

    Args:
        update: [N, H, K, V] state that this chunk would end with if it started from zero.
        decay: [N, H] what is left of a state behind this chunk, 0 to 1.

    Returns:
        [N, H, K, V]; zeros on the first rank.
    """
    return _StateBefore.apply(update, decay, group)


def _gather(x: Tensor, group: ProcessGroup) -> Tensor:
    """[...] on each rank -> [C, ...] on all."""
    gathered = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    _all_gather(gathered, x.contiguous(), group=group)
    return gathered.unflatten(0, (group.size(), -1))


class _AllChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dim, group):
        ctx.dim, ctx.group = dim, group
        return _gather(x, group).movedim(0, dim).flatten(dim, dim + 1)

    @staticmethod
    def backward(ctx, grad):
        shares = grad.unflatten(ctx.dim, (ctx.group.size(), -1)).movedim(ctx.dim, 0).contiguous()
        own = torch.empty_like(shares[0])
        _reduce_scatter(own, shares.flatten(0, 1), group=ctx.group)
        return own, None, None


class _PreviousTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count, group):
        T = x.shape[1]
        # counts[h]: tokens wanted from the rank h + 1 places before, its last ones
        ctx.counts = [min(T, count - hop * T) for hop in range(min(-(-count // T), group.size() - 1))]
        ctx.group, ctx.shape = group, x.shape
        tails = [x[:, T - size :].contiguous() for size in ctx.counts]
        pieces = [x.new_empty(x.shape[0], size, *x.shape[2:]) for size in ctx.counts[: group.rank()]]
        _shift(tails, pieces, 1, group)
        return torch.cat(pieces[::-1], dim=1) if pieces else x[:, :0].clone()

    @staticmethod
    def backward(ctx, grad):
        group, (N, T, *rest) = ctx.group, ctx.shape
        heard = ctx.counts[: group.rank()]
        pieces = [piece.contiguous() for piece in grad.split(heard[::-1], dim=1)][::-1] if heard else []
        told = ctx.counts[: group.size() - 1 - group.rank()]
        returned = [grad.new_empty(N, size, *rest) for size in told]
        _shift(pieces, returned, -1, group)
        own = grad.new_zeros(ctx.shape)
        for size, piece in zip(told, returned, strict=True):
            own[:, T - size :] += piece
        return own, None, None


def _shift(outgoing: list[Tensor], incoming: list[Tensor], direction: int, group: ProcessGroup) -> None:
    """Send outgoing[h] to the rank h + 1 places in `direction`, and fill incoming[h] from h + 1 places against it."""
    operations = [
        dist.P2POp(operation, tensor, group=group, group_peer=peer)
        for tensors, sign, operation in ((outgoing, direction, dist.isend), (incoming, -direction, dist.irecv))
        for hop, tensor in enumerate(tensors)
        if 0 <= (peer := group.rank() + sign * (hop + 1)) < group.size()
    ]
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()


class _StateBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx, update, decay, group):
        updates, decays = _gather(update, group), _gather(decay, group)[..., None, None]
        start = torch.zeros_like(update)
        for rank in range(group.rank()):
            start = decays[rank] * start + updates[rank]
        ctx.group = group
        ctx.save_for_backward(decays, start)
        return start

    @staticmethod
    def backward(ctx, grad):
        decays, start = ctx.saved_tensors
        grads = _gather(grad, ctx.group)
        # the gradient of the state behind this chunk: what the start of each later chunk makes of it
        behind = torch.zeros_like(grad)
        for rank in reversed(range(ctx.group.rank() + 1, ctx.group.size())):
            behind = decays[rank] * behind + grads[rank]
        return behind, (behind * start).sum((-2, -1)), None
