"""Crossbatch attention one context at a time, with a running softmax.

Round 0 is every row over itself; round c is every row that sees c rows before it over the c-th of them. Each round's
outputs join what is there already. Nothing of the size of several contexts' keys or scores ever exists: beside inputs
and output there are the log-sum-exps [B, T, H] and one round's keys. The backward pass recomputes the weights round by
round from the joined log-sum-exp, as FlashAttention does (arXiv 2205.14135, section 3.1).
"""

from __future__ import annotations

import torch

from oncelm.ops.attention.partial import join_attention, partial_attention, partial_attention_backward


def running(q, k, first_k, v, counts, scale):
    return _Crossbatch.apply(q, k, first_k, v, counts, scale)


class _Crossbatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, first_k, v, counts, scale):
        o, lse = partial_attention(q, k, v, start=0, scale=scale)
        for rows, others in _rounds(counts, q.device):
            part = partial_attention(q[rows], first_k[others], v[others], scale=scale)
            o[rows], lse[rows] = join_attention((o[rows], lse[rows]), part)
        out = o.to(q.dtype)
        ctx.save_for_backward(q, k, first_k, v, out, lse)
        ctx.counts, ctx.scale = counts, scale
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, first_k, v, out, lse = ctx.saved_tensors
        delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        dq, dk, dv = partial_attention_backward(grad, delta, lse, q, k, v, start=0, scale=ctx.scale)
        d_first = torch.zeros_like(dk)
        for rows, others in _rounds(ctx.counts, q.device):
            inputs = (grad[rows], delta[rows], lse[rows], q[rows], first_k[others], v[others])
            more_q, more_k, more_v = partial_attention_backward(*inputs, scale=ctx.scale)
            dq[rows] += more_q
            d_first[others] += more_k  # no row appears twice in one round
            dv[others] += more_v
        return dq.to(q.dtype), dk.to(k.dtype), d_first.to(first_k.dtype), dv.to(v.dtype), None, None


def _rounds(counts, device):
    """(rows, the rows they see) of round 1, 2, ...: index vectors."""
    for distance in range(1, max(counts, default=0) + 1):
        rows = torch.tensor([row for row, count in enumerate(counts) if count >= distance], device=device)
        yield rows, rows - distance
