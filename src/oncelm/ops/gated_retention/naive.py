"""The parallel form: the definition written as one masked matrix product, quadratic in T. The reference."""

from __future__ import annotations

import torch


def parallel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """o_i = sum_{j <= i} exp(G_i - G_j) scale (q_i . k_j) v_j + exp(G_i) q_i S_0, with G the running sum of g."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v, g = (x.to(dtype).transpose(1, 2) for x in (q, k, v, g))  # [B, H, T, *]
    total = g.cumsum(-1)  # G
    T = g.shape[-1]
    future = torch.ones(T, T, dtype=torch.bool, device=g.device).triu(1)
    # G_i - G_j summed as g_{j+1} + ... + g_i: a difference of long sums keeps their rounding and not their digits
    between = g[..., :, None].expand(*g.shape, T).tril(-1).cumsum(-2)
    decay = between.exp().masked_fill(future, 0.0)  # of the future, where `between` is 0, nothing is seen
    o = (q @ k.mT * decay * scale) @ v
    last, to_end = (total[..., -1:], between[..., -1, :]) if T else (g.new_zeros(*g.shape[:-1], 1), total)
    state = (k * to_end.exp()[..., None] * scale).mT @ v
    if initial_state is not None:
        initial_state = initial_state.to(dtype)
        o = o + total.exp()[..., None] * (q @ initial_state)
        state = state + last.exp()[..., None] * initial_state
    return o.transpose(1, 2), state
