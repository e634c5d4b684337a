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
    future = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).triu(1)
    # masked before exp: exp of a future difference may overflow, and inf * 0 is NaN in the backward pass
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(future, -torch.inf).exp()
    o = (q @ k.mT * decay * scale) @ v
    last = total[..., -1:] if g.shape[-1] else g.new_zeros(*g.shape[:-1], 1)
    state = (k * (last - total).exp()[..., None] * scale).mT @ v
    if initial_state is not None:
        initial_state = initial_state.to(dtype)
        o = o + total.exp()[..., None] * (q @ initial_state)
        state = state + last.exp()[..., None] * initial_state
    return o.transpose(1, 2), state
