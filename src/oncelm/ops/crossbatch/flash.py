"""The rounds of crossbatch attention through torch's FlashAttention, which gives the log-sum-exps that join them.

Its backward pass recomputes the weights from whatever output and log-sum-exp it is handed: with those of all rounds
joined, it gives one round's share of the gradients. torch's ring attention for context parallelism does the same.
Rounds are rounded to 16 bits and joined in float32. What the kernel does not take goes through blocks.py.
"""

from __future__ import annotations

import torch

from oncelm.ops.attention.varlen import autocast, fits
from oncelm.ops.crossbatch.blocks import Crossbatch
from oncelm.ops.crossbatch.blocks import running as in_pytorch
from oncelm.ops.layout import aligned


def running(q, k, first_k, v, counts, scale):
    q, k, first_k, v = autocast(q, k, first_k, v)
    if not fits(q, k):
        return in_pytorch(q, k, first_k, v, counts, scale)
    return Crossbatch.apply(q, k, first_k, v, counts, scale, Flash())


class Flash:
    """One round; on a CPU torch's own form of the same, for tests."""

    def forward(self, q, k, v, causal, scale):
        inputs = _heads_first(q, k, v)
        if q.is_cuda:
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*inputs, 0.0, causal, scale=scale)
        else:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*inputs, 0.0, causal, scale=scale)
        return out.transpose(1, 2), lse.transpose(1, 2).contiguous()

    def backward(self, grad, out, lse, q, k, v, causal, scale):
        inputs = *_heads_first(q, k, v), out.transpose(1, 2), lse.transpose(1, 2).contiguous()
        gradient = grad.to(q.dtype).transpose(1, 2)
        if q.is_cuda:
            # without dropout the state of the random numbers is not read
            lengths, unread = (None, None, q.shape[1], k.shape[1]), torch.zeros(2, dtype=torch.uint64, device=q.device)
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                gradient, *inputs, *lengths, 0.0, causal, unread, unread[0], scale=scale
            )
        else:
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient, *inputs, 0.0, causal, scale=scale
            )
        dk, dv = (x.to(lse.dtype).unflatten(1, (k.shape[2], -1)).sum(2) for x in (dk, dv))
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _heads_first(q, k, v):
    """[B, H, T, D] each: a key/value head for every query head, which all versions of the kernel take."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
    q, k, v = (aligned(x) for x in (q, k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
