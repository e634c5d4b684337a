"""What stands before a float8 product, fused with rounding its result by rows: Triton kernels without gradients.

A row's scale follows from its largest element, so whoever cannot hold a row computes it twice: once for the scale, once
to round it. Here a program holds one whole row in registers; each input is read once, each output written once.

    norm_rows        rms_norm(x) weight, in x's dtype too (for what is multiplied exactly)
    add_norm_rows    x + y, and rms_norm(x + y) weight
    swiglu_rows      silu(x) gate
    gate_heads_rows  silu(gate) rms_norm(o of each head)

Intermediate results stay float32. Each is a torch custom op, which torch.compile takes as it is.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oncelm.ops import gpu
from oncelm.ops.float8 import LARGEST, SMALLEST_MAXIMUM, Float8Rows

__all__ = ["add_norm_rows", "gate_heads_rows", "norm_rows", "swiglu_rows"]

Tensor = torch.Tensor

ELEMENTS = 32  # of a row that a thread holds; the rest of a multiprocessor's registers keeps other rows on their way
MOST_WARPS = 16

LARGEST_ELEMENT = tl.constexpr(LARGEST)
SMALLEST = tl.constexpr(SMALLEST_MAXIMUM)


@triton.jit
def store_rounded(y, largest, inside, values, scales, row):
    """y, any shape, one row, to the pointers `values`; its scale from its largest magnitude."""
    largest = tl.maximum(largest, SMALLEST)
    tl.store(scales + row, largest / LARGEST_ELEMENT)
    tl.store(values, (y * (LARGEST_ELEMENT / largest)).to(tl.float8e4nv), mask=inside)


@triton.jit
def norm_kernel(x, added, weight, exact, values, scales, eps, K: tl.constexpr, BLOCK: tl.constexpr):
    """`exact` is x + added, where that is given, and else the norm."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    places = row * K + columns
    y = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    if added is not None:
        y += tl.load(added + places, mask=inside, other=0.0).to(tl.float32)
        y = y.to(exact.dtype.element_ty)
        tl.store(exact + places, y, mask=inside)
        y = y.to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, 0) / K + eps)
    y *= tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if added is None:
        tl.store(exact + places, y.to(exact.dtype.element_ty), mask=inside)
    store_rounded(y, tl.max(tl.abs(y), 0), inside, values + places, scales, row)


@triton.jit
def swiglu_kernel(x, gate, values, scales, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    places = row * K + columns
    y = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    y *= tl.sigmoid(y) * tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)
    store_rounded(y, tl.max(tl.abs(y), 0), inside, values + places, scales, row)


@triton.jit
def gate_heads_kernel(
    o, gate, values, scales, eps, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    """A row is [H, D], held as [HEADS, BLOCK]."""
    row = tl.program_id(0).to(tl.int64)
    heads, columns = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (heads < H) & (columns < D)
    places = row * (H * D) + heads * D + columns
    y = tl.load(o + places, mask=inside, other=0.0).to(tl.float32)
    y *= tl.rsqrt(tl.sum(y * y, 1) / D + eps)[:, None]
    factor = tl.load(gate + places, mask=inside, other=0.0).to(tl.float32)
    y *= factor * tl.sigmoid(factor)
    store_rounded(y, tl.max(tl.max(tl.abs(y), 1), 0), inside, values + places, scales, row)


def _warps(elements: int) -> int:
    return max(1, min(MOST_WARPS, elements // (32 * ELEMENTS)))


def _rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the values and scales of x [..., K]."""
    return torch.empty_like(x, dtype=torch.float8_e4m3fn), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    exact, (values, scales) = torch.empty_like(x), _rounded(x)
    K = x.shape[-1]
    block = triton.next_power_of_2(K)
    with gpu.on(x):
        norm_kernel[(x.numel() // K,)](
            x, added, weight, exact, values, scales, eps, K=K, BLOCK=block, num_warps=_warps(block)
        )
    return exact, values, scales


@torch.library.custom_op("oncelm::norm_rows", mutates_args=())
def norm_rows_op(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _norm(x, None, weight, eps)


@torch.library.custom_op("oncelm::add_norm_rows", mutates_args=())
def add_norm_rows_op(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _norm(x, y, weight, eps)


@torch.library.custom_op("oncelm::swiglu_rows", mutates_args=())
def swiglu_rows_op(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = _rounded(x)
    K = x.shape[-1]
    block = triton.next_power_of_2(K)
    with gpu.on(x):
        swiglu_kernel[(x.numel() // K,)](x, gate, values, scales, K=K, BLOCK=block, num_warps=_warps(block))
    return values, scales


@torch.library.custom_op("oncelm::gate_heads_rows", mutates_args=())
def gate_heads_rows_op(o: Tensor, gate: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    H, D = o.shape[-2:]
    values, scales = _rounded(gate)
    heads, block = triton.next_power_of_2(H), triton.next_power_of_2(D)
    with gpu.on(o):
        gate_heads_kernel[(o.numel() // (H * D),)](
            o, gate, values, scales, eps, H=H, D=D, HEADS=heads, BLOCK=block, num_warps=_warps(heads * block)
        )
    return values, scales


@norm_rows_op.register_fake
def _(x, weight, eps):
    return torch.empty_like(x), *_rounded(x)


@add_norm_rows_op.register_fake
def _(x, y, weight, eps):
    return torch.empty_like(x), *_rounded(x)


@swiglu_rows_op.register_fake
def _(x, gate):
    return _rounded(x)


@gate_heads_rows_op.register_fake
def _(o, gate, eps):
    return _rounded(gate)


def norm_rows(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Float8Rows]:
    """rms_norm(x) weight, x [..., K], in x's dtype and rounded."""
    normed, values, scales = norm_rows_op(x.contiguous(), weight.contiguous(), eps)
    return normed, Float8Rows(values, scales)


def add_norm_rows(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Float8Rows]:
    """x + y [..., K] in x's dtype, and its norm rounded."""
    total, values, scales = add_norm_rows_op(x.contiguous(), y.contiguous(), weight.contiguous(), eps)
    return total, Float8Rows(values, scales)


def swiglu_rows(x: Tensor, gate: Tensor) -> Float8Rows:
    """silu(x) gate, both [..., K], rounded."""
    return Float8Rows(*swiglu_rows_op(x.contiguous(), gate.contiguous()))


def gate_heads_rows(o: Tensor, gate: Tensor, eps: float) -> Float8Rows:
    """silu(gate) rms_norm(o) for o [..., H, D], gate [..., H D], rounded."""
    return Float8Rows(*gate_heads_rows_op(o.contiguous(), gate.contiguous(), eps))
