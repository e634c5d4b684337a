"""The short convolution through flash-linear-attention's kernels."""

from __future__ import annotations

import importlib

import torch
import torch.nn.functional as F

from oncelm.ops.fla_trust import TOLERANCE, learns, trusted
from oncelm.ops.short_convolution import shifts as portable

Tensor = torch.Tensor


@torch.compiler.disable
def convolve(x: Tensor, weight: Tensor, state: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [B, T, D], weight [D, W], state [N, W - 1, D] -> y [B, T, D], final state.

    What the kernels do not take, or do not compute rightly on this GPU, runs in shifts.py.
    """
    if not _suits(x, weight, state, packed=cu_seqlens is not None):
        return portable.shifts(x, weight, state, cu_seqlens)
    return _kernels(x, weight, state, cu_seqlens)


def _suits(x: Tensor, weight: Tensor, state: Tensor, packed: bool) -> bool:
    D, W = weight.shape
    if x.dtype not in TOLERANCE or weight.dtype not in TOLERANCE or W == 1 or x.numel() == 0 or len(state) == 0:
        return False

    def borders() -> Tensor | None:  # made for the trial alone: a GPU is waited for
        return torch.tensor([0, 70, 70, 72, 200], device=x.device) if packed else None

    def inputs() -> list[Tensor]:
        """Made-up x, weight and states of 200 tokens."""
        generator = torch.Generator().manual_seed(0)
        shapes = {(1, 200, D): x.dtype, (D, W): weight.dtype, (4 if packed else 1, W - 1, D): x.dtype}
        return [torch.randn(shape, generator=generator).to(x.device, dtype) for shape, dtype in shapes.items()]

    return trusted(
        "short_convolution",
        (x.device, x.dtype, weight.dtype, D, W, packed),
        lambda x, weight, state: _kernels(x, weight, state, borders()),
        lambda x, weight, state: portable.shifts(x, weight, state, borders()),
        inputs,
        learns(x, weight, state),
    )


def _kernels(x: Tensor, weight: Tensor, state: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Their states have room for W inputs and lie [N, D, W]."""
    kernel = importlib.import_module("fla.modules.convolution").causal_conv1d
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(x.device)
    padded = F.pad(state.mT, (1, 0))
    y, final_state = kernel(
        x, weight, initial_state=padded, output_final_state=True, activation="silu", cu_seqlens=cu_seqlens
    )
    return y, final_state[..., 1:].mT
