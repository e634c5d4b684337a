"""The gated delta rule: linear attention that overwrites what a key held (Gated DeltaNet, arXiv 2412.06464).

For each sequence and head, with log decay g_t <= 0 and write strength beta_t in [0, 1], keys of length 1:

    S_t = exp(g_t) (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t        S [K, V], float32
    o_t = scale * q_t S_t

README.md beside this file derives the forms; they agree to rounding.
"""

from __future__ import annotations

import torch

from oncelm.ops.linear_attention import scan

__all__ = ["gated_delta"]


def gated_delta(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The gated delta rule over a batch of sequences, or over packed sequences.

    Args:
        q, k: [B, T, H, K], any floating dtype; of several dtypes the widest is computed in. Keys should have length 1
            (`F.normalize(k, dim=-1)`): a longer one, of squared length n with beta_t n > 2, makes the state grow.
        v: [B, T, H, V].
        g: [B, T, H] log decay, at most 0; float32 is advised.
        beta: [B, T, H] how much of what the key held is replaced, 0 to 1.
        scale: factor on q; None means K ** -0.5.
        initial_state: [N, H, K, V] state before the first token; None means zeros. N is B, or the number of
            packed sequences.
        output_final_state: also return the state after the last token of each sequence.
        cu_seqlens: [N + 1] int, cumulative lengths of N sequences packed along T (then B must be 1); empty
            sequences are allowed. On a GPU only its shape is checked: reading the values would wait for the device.
        backend: "auto", "fla", "chunk", "recurrent" or "naive" (see `oncelm info`).

    Returns:
        o [B, T, H, V] in v's dtype, and the final state [N, H, K, V] (float32; float64 for float64 inputs) or None.

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
    """
    return scan(
        "gated_delta", q, k, v, {"g": g, "beta": beta}, scale, initial_state, output_final_state, cu_seqlens, backend
    )
