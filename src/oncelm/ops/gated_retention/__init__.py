"""Gated retention: linear attention with a data-dependent scalar decay per head (YOCO, arXiv 2405.05254, section 3.1).

For each sequence and head, with log decay g_t <= 0:

    S_t = exp(g_t) S_{t-1} + scale * k_t^T v_t        S [K, V], float32
    o_t = q_t S_t

README.md beside this file derives the three forms; they agree to rounding.
"""

from __future__ import annotations

import torch

from oncelm.ops.dispatch import choose
from oncelm.ops.dtypes import one_dtype
from oncelm.ops.linear_attention import check_inputs
from oncelm.ops.packed import by_sequence

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
    check_inputs(q, k, v, {"g": g}, initial_state, cu_seqlens)
    if backend == "auto" and q.shape[1] == 1 and cu_seqlens is None:
        backend = "recurrent"
    chosen = choose("gated_retention", backend, q.device)
    compute = chosen.load()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out_dtype = v.dtype
    q, k, v = one_dtype(q, k, v)
    g = g.to(torch.promote_types(q.dtype, torch.float32))
    if cu_seqlens is None:
        o, final_state = compute(q, k, v, g, scale, initial_state)
    elif chosen.packed:
        o, final_state = compute(q, k, v, g, scale, initial_state, cu_seqlens)
    else:
        o, final_state = by_sequence(compute, (q, k, v, g), (scale,), initial_state, cu_seqlens)
    return o.to(out_dtype), (final_state if output_final_state else None)
