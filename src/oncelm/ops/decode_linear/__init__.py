"""Linear layers for a few tokens, fused with what stands before and after them: the token-wise half of a decode step.

Generating a token is bound by reading the weights, and every small kernel between two products leaves the memory idle
for longer than the kernel takes: a decode step of the 3B model is 182 products and about 700 other kernels. Three
functions, one kernel each, are all of a layer but the mixing of tokens:

    norm_linears   rms_norm, then several projections; RoPE or the log decay on those that have it
    linear_add     (head norm and gate, then) a projection, added to the residual stream
    norm_swiglu    rms_norm, then silu(x W1^T) * (x W2^T)

They need Triton and give no gradients; the tests compare them with the same in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton

from oncelm.ops import gpu
from oncelm.ops.decode_linear import kernels

__all__ = ["LARGEST_HEAD", "MOST_ROWS", "linear_add", "norm_linears", "norm_swiglu", "padded_rows"]

Tensor = torch.Tensor

MOST_ROWS = 16  # tokens at once; a matrix product of more rows does better
LARGEST_HEAD = 256  # columns that `linear_add` normalises together, a power of two

LONG = 4096  # columns of x, above which one row is multiplied in another form

KINDS = {"plain": kernels.PLAIN, "rope": kernels.ROPE, "decay": kernels.DECAY}

# (kernel, padded rows) -> how it is compiled, from the sweep of benchmarks/gpu_decode_linear.py (H100)
FORMS = {
    ("norm_linears", 1): {"BLOCK_N": 4, "BLOCK_K": 1024, "STAGES": 1, "num_warps": 4},
    ("norm_linears", 2): {"BLOCK_N": 4, "BLOCK_K": 512, "STAGES": 1, "num_warps": 4},
    ("norm_linears", 4): {"BLOCK_N": 4, "BLOCK_K": 512, "STAGES": 1, "num_warps": 4},
    ("norm_linears", 16): {"BLOCK_N": 16, "BLOCK_K": 128, "STAGES": 5, "num_warps": 2},
    ("linear_add", 1): {"BLOCK_N": 4, "BLOCK_K": 1024, "STAGES": 1, "num_warps": 4},
    ("linear_add", 2): {"BLOCK_N": 4, "BLOCK_K": 512, "STAGES": 1, "num_warps": 4},
    ("linear_add", 4): {"BLOCK_N": 4, "BLOCK_K": 512, "STAGES": 1, "num_warps": 4},
    ("linear_add", 16): {"BLOCK_N": 16, "BLOCK_K": 256, "STAGES": 4, "num_warps": 2},
    ("linear_add_long", 1): {"BLOCK_N": 2, "BLOCK_K": 512, "STAGES": 3, "num_warps": 4},
    ("norm_swiglu", 1): {"BLOCK_N": 2, "BLOCK_K": 1024, "STAGES": 1, "num_warps": 4},
    ("norm_swiglu", 2): {"BLOCK_N": 4, "BLOCK_K": 512, "STAGES": 1, "num_warps": 4},
    ("norm_swiglu", 4): {"BLOCK_N": 4, "BLOCK_K": 512, "STAGES": 1, "num_warps": 4},
    ("norm_swiglu", 16): {"BLOCK_N": 32, "BLOCK_K": 256, "STAGES": 3, "num_warps": 4},
}


def norm_linears(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weights: Sequence[Tensor],
    kinds: Sequence[str],
    *,
    rotation: Tensor | None = None,
    pairing: str = "interleaved",
    decay_scale: float = 1.0,
) -> list[Tensor]:
    """rms_norm(x) times each weight.

    Args:
        x: [M, K], M at most MOST_ROWS.
        norm_weight: [K].
        weights: [n_j, K] each.
        kinds: of each output: "plain"; "rope", heads rotated by `rotation` [M, D/2, 2] (`ops.rope_rotation`) in the
            convention `pairing`; or "decay", decay_scale * log sigmoid, float32.

    Returns:
        [M, n_j] each, in x's dtype but for decays.
    """
    M, K = x.shape
    outputs = [
        x.new_empty(M, weight.shape[0], dtype=torch.float32 if kind == "decay" else x.dtype)
        for weight, kind in zip(weights, kinds, strict=True)
    ]
    sizes = _sizes("norm_linears", M, K)
    grid = sum(triton.cdiv(weight.shape[0], 2 * sizes["BLOCK_N"]) for weight in weights)
    with gpu.on(x):
        kernels.norm_linears_kernel[(grid,)](
            x.contiguous(), norm_weight.contiguous(), eps, tuple(weight.contiguous() for weight in weights),
            tuple(outputs), None if rotation is None else rotation.contiguous(), decay_scale,
            COUNTS=tuple(weight.shape[0] for weight in weights), KINDS=tuple(KINDS[kind].value for kind in kinds),
            HALF=pairing == "half", PAIRS=1 if rotation is None else rotation.shape[1], **sizes,
        )  # fmt: skip
    return outputs


def linear_add(
    x: Tensor, weight: Tensor, residual: Tensor, *, gate: Tensor | None = None, head_dim: int = 1, eps: float = 0.0
) -> Tensor:
    """residual + z weight^T, with z = x, or with a gate z = silu(gate) * rms_norm(x of each head).

    Args:
        x, gate: [M, K], M at most MOST_ROWS; with a gate, heads of `head_dim` columns, a power of two up to
            LARGEST_HEAD.
        weight: [n, K]. residual: [M, n].
    """
    M, K = x.shape
    assert gate is None or (head_dim <= LARGEST_HEAD and head_dim & (head_dim - 1) == 0), head_dim
    y = x.new_empty(M, weight.shape[0], dtype=residual.dtype)
    gate = None if gate is None else gate.contiguous()
    sizes = _sizes("linear_add_long" if M == 1 and K > LONG else "linear_add", M, K, smallest=head_dim)
    with gpu.on(x):
        kernels.linear_add_kernel[(triton.cdiv(weight.shape[0], sizes["BLOCK_N"]),)](
            x.contiguous(), gate, eps, weight.contiguous(), residual.contiguous(), y,
            COUNT=weight.shape[0], HEAD=head_dim, **sizes,
        )  # fmt: skip
    return y


def norm_swiglu(x: Tensor, norm_weight: Tensor, eps: float, weight: Tensor, gate_weight: Tensor) -> Tensor:
    """silu(h weight^T) * (h gate_weight^T), h = rms_norm(x): x [M, K], weights [n, K] -> [M, n]."""
    M, K = x.shape
    y = x.new_empty(M, weight.shape[0])
    sizes = _sizes("norm_swiglu", M, K)
    with gpu.on(x):
        kernels.norm_swiglu_kernel[(triton.cdiv(weight.shape[0], sizes["BLOCK_N"]),)](
            x.contiguous(), norm_weight.contiguous(), eps, weight.contiguous(), gate_weight.contiguous(), y,
            COUNT=weight.shape[0], **sizes,
        )  # fmt: skip
    return y


def padded_rows(M: int) -> int:
    """Rows that the kernels compute for M."""
    return triton.next_power_of_2(M) if M <= 4 else MOST_ROWS


def _sizes(kernel: str, M: int, K: int, smallest: int = 16) -> dict[str, int]:
    """The kernel's constants for M rows of K columns; blocks no longer than K, nor shorter than `smallest`."""
    assert 0 < M <= MOST_ROWS, M
    padded = padded_rows(M)
    form = FORMS[kernel, padded]
    block = max(smallest, min(form["BLOCK_K"], triton.next_power_of_2(K)))
    return {**form, "BLOCK_K": block, "M": M, "MP": padded, "K": K}
