"""Crossbatch attention one context at a time, with a running softmax.

Round 0 is every row over itself; round c is every row that sees c rows before it over the c-th of them. Each round's
outputs join what is there already. Nothing of the size of several contexts' keys or scores ever exists: beside inputs
and output there are the log-sum-exps [B, T, H] and one round's keys. The backward pass recomputes the weights round by
round from the joined log-sum-exp, as FlashAttention does (arXiv 2205.14135, section 3.1).

What computes a round is exchangeable: `Round`, here in PyTorch, in flash.py a kernel.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from oncelm.ops.attention.partial import join_attention, partial_attention, partial_attention_backward


class Round(Protocol):
    """Attention of q [B, T, H, D] over one set of keys k, v [B, T, H_kv, D], causal or whole."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
        """o [B, T, H, D] over these keys and its lse [B, T, H]."""
        ...

    def backward(
        self,
        grad: Tensor,
        out: Tensor,
        lse: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What these keys add to dq, dk, dv, from the gradient, output and lse of all rounds joined."""
        ...


class InPyTorch:
    """In float32 or wider."""

    def forward(self, q, k, v, causal, scale):
        return partial_attention(q, k, v, start=0 if causal else None, scale=scale)

    def backward(self, grad, out, lse, q, k, v, causal, scale):
        delta = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        return partial_attention_backward(grad, delta, lse, q, k, v, start=0 if causal else None, scale=scale)


def running(q, k, first_k, v, counts, scale):
    return Crossbatch.apply(q, k, first_k, v, counts, scale, InPyTorch())


class Crossbatch(torch.autograd.Function):
    """The rounds, and their gradients."""

    @staticmethod
    def forward(ctx, q, k, first_k, v, counts, scale, each):
        wide = torch.promote_types(q.dtype, torch.float32)
        o, lse = each.forward(q, k, v, True, scale)
        o = o.to(wide)
        for rows, others in _rounds(counts, q.device):
            part = each.forward(q[rows], first_k[others], v[others], False, scale)
            o[rows], lse[rows] = join_attention((o[rows], lse[rows]), part)
        out = o.to(q.dtype)
        ctx.save_for_backward(q, k, first_k, v, out, lse)
        ctx.counts, ctx.scale, ctx.each = counts, scale, each
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, first_k, v, out, lse = ctx.saved_tensors
        wide = lse.dtype
        dq, dk, dv = (x.to(wide) for x in ctx.each.backward(grad, out, lse, q, k, v, True, ctx.scale))
        d_first = torch.zeros_like(dk)
        for rows, others in _rounds(ctx.counts, q.device):
            inputs = (grad[rows], out[rows], lse[rows], q[rows], first_k[others], v[others])
            more_q, more_k, more_v = ctx.each.backward(*inputs, False, ctx.scale)
            dq[rows] += more_q.to(wide)
            d_first[others] += more_k.to(wide)  # no row appears twice in one round
            dv[others] += more_v.to(wide)
        return dq.to(q.dtype), dk.to(k.dtype), d_first.to(first_k.dtype), dv.to(v.dtype), None, None, None


def _rounds(counts, device):
    """(rows, the rows they see) of round 1, 2, ...: index vectors."""
    for distance in range(1, max(counts, default=0) + 1):
        rows = torch.tensor([row for row, count in enumerate(counts) if count >= distance])
        rows = rows.to(device, non_blocking=True)
        yield rows, rows - distance
