"""The definition, one token at a time with the K x K matrix that each applies to the state. The reference."""

from __future__ import annotations

import torch


def by_token(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = exp(g_t) (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t; o_t = scale q_t S_t."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v, g, beta = (x.to(dtype) for x in (q, k, v, g, beta))
    B, T, H, K = q.shape
    state = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    identity = torch.eye(K, dtype=dtype, device=q.device)
    outputs = []
    for t in range(T):
        key, value, query = k[:, t, :, None, :], v[:, t, :, None, :], q[:, t, :, None, :]  # [B, H, 1, K or V]
        decay, strength = g[:, t, :, None, None].exp(), beta[:, t, :, None, None]
        state = decay * (identity - strength * key.mT @ key) @ state + strength * key.mT @ value
        outputs.append(scale * query @ state)
    o = torch.cat(outputs, dim=2).transpose(1, 2) if outputs else torch.zeros_like(v)
    return o, state
