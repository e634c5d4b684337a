"""The recurrent form: one update of rank 1 a token, as in decoding."""

from __future__ import annotations

import torch

from oncelm.ops.linear_attention import update


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S = exp(g_t) S_{t-1}; S_t = S + k_t^T beta_t (v_t - k_t S); o_t = scale q_t S_t."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v, decay, beta = q.to(dtype) * scale, k.to(dtype), v.to(dtype), g.to(dtype).exp(), beta.to(dtype)
    B, T, H, K = q.shape
    state = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        key, strength = k[:, t, :, None, :], beta[:, t, :, None, None]
        state = state * decay[:, t, :, None, None]
        state = torch.addcmul(state, key.mT, strength * (v[:, t, :, None, :] - key @ state))
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))  # [B, H, V]
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v), state


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor | None,
    kept: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The same for states that stand in slots and are changed in place; negative slots are left alone."""
    return update(recurrent, (q, k, v, g, beta), scale, state, slots, kept).to(v.dtype)
