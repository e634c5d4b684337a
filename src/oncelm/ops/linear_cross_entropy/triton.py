"""Logits into losses and gradients, in one kernel: a program reads a row twice, the second time in part from L2."""

# mypy: allow-incomplete-defs
# a kernel's arguments are pointers and numbers whose types Triton infers; only its constants are annotated

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oncelm.ops import gpu
from oncelm.ops.linear_cross_entropy import naive

LARGEST_BLOCK = 16384
ELEMENTS_PER_THREAD = 16


@triton.jit
def softmax_kernel(logits, targets, losses, V, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """Row r: losses[r] = log sum_v exp(x_v) - x_t, and, if GRADIENT, x_v becomes exp(x_v) / sum - [v = t].

    A target outside 0..V-1 gives the loss NaN and reads nothing.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * V
    target = tl.load(targets + row)
    inside = (target >= 0) & (target < V)
    at_target = tl.load(logits + target, mask=inside, other=float("nan")).to(tl.float32)
    column = tl.arange(0, BLOCK)
    high = float("-inf")
    total = 0.0
    for start in range(0, V, BLOCK):
        v = start + column
        x = tl.load(logits + v, mask=v < V, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        higher = tl.maximum(high, tl.max(x, 0))
        total = total * tl.exp(high - higher) + tl.sum(tl.exp(x - higher), 0)
        high = higher
    # differences from the highest logit first: high + log(total) would round to a part of `high`, not of the result
    tl.store(losses + row, tl.log(total) - (at_target - high))
    if GRADIENT:
        inverse = 1.0 / total
        for start in range(0, V, BLOCK):
            v = start + column
            x = tl.load(logits + v, mask=v < V, other=float("-inf"), eviction_policy="evict_first").to(tl.float32)
            gradient = tl.exp(x - high) * inverse - tl.where(v == target, 1.0, 0.0)
            tl.store(logits + v, gradient.to(logits.dtype.element_ty), mask=v < V, eviction_policy="evict_first")


def to_gradient(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor, gradient: bool) -> None:
    """The same as naive.to_gradient; logits [M, V] lie row by row."""
    if logits.dtype == torch.float64:
        return naive.to_gradient(logits, targets, losses, gradient)
    M, V = logits.shape
    block = min(LARGEST_BLOCK, triton.next_power_of_2(V))
    warps = max(1, min(32, block // (32 * ELEMENTS_PER_THREAD)))
    if M:
        with gpu.on(logits):
            softmax_kernel[(M,)](
                logits, targets.contiguous(), losses, V, GRADIENT=gradient, BLOCK=block, num_warps=warps
            )
