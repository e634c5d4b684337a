"""Gated retention: linear attention with a data-dependent scalar decay per head (YOCO, arXiv 2405.05254, section 3.1).

For each sequence and head, with log decay g_t <= 0:

    S_t = exp(g_t) S_{t-1} + scale * k_t^T v_t        S [K, V], float32
    o_t = q_t S_t

README.md beside this file derives the three forms; they agree to rounding.
"""

from __future__ import annotations

import torch

from oncelm.ops.linear_attention import scan

__all__ = ["gated_retention"]


def gated_retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated retention over a batch of sequences, or over packed sequences.

    Args:
        q, k: [B, T, H, K], any floating dtype, already rotated; of several dtypes the widest is computed in.
        v: [B, T, H, V].
        g: [B, T, H] log decay, at most 0; float32 is advised.
        scale: factor on k^T v; None means K ** -0.5.
        initial_state: [N, H, K, V] state before the first token; None means zeros. N is B, or the number of
            packed sequences.
        output_final_state: also return the state after the last token of each sequence.
        cu_seqlens: [N + 1] int, cumulative lengths of N sequences packed along T (then B must be 1); empty
            sequences are allowed. On a GPU only its shape is checked: reading the values would wait for the device.
        backend: "auto", "triton", "chunk", "recurrent" or "naive" (see `oncelm info`).

    Returns:
        o [B, T, H, V] in v's dtype, and the final state [N, H, K, V] (float32; float64 for float64 inputs) or None.

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
    """
    return scan("gated_retention", q, k, v, {"g": g}, scale, initial_state, output_final_state, cu_seqlens, backend)
