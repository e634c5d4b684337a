"""The recurrent form: one state update a token, as in decoding."""

from __future__ import annotations

import torch

from oncelm.ops.linear_attention import update


def recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """S_t = exp(g_t) S_{t-1} + scale k_t^T v_t; o_t = q_t S_t."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v, decay = q.to(dtype), k.to(dtype) * scale, v.to(dtype), g.to(dtype).exp()
    B, T, H, K = q.shape
    state = q.new_zeros(B, H, K, v.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outputs = []
    for t in range(T):
        state = torch.addcmul(state * decay[:, t, :, None, None], k[:, t, :, :, None], v[:, t, :, None, :])
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))  # [B, H, V]
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(v), state


LARGE = 1 << 15  # numbers of a sequence's states, beyond which several at once leave a core's cache


def step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor | None,
    kept: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """The same for states that stand in slots and are changed in place; negative slots are left alone."""
    exact = torch.promote_types(q.dtype, state.dtype) == state.dtype
    if q.shape[1] == 1 and kept is None and state.device.type == "cpu" and state[0].numel() >= LARGE and exact:
        return _one_by_one(q, k, v, g, state, slots, scale).to(v.dtype)
    return update(recurrent, (q, k, v, g), scale, state, slots, kept).to(v.dtype)


def _one_by_one(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """One token, sequence by sequence: each state goes through memory once, where several at once go nine times."""
    q, k, v, decay = q.to(state.dtype), k.to(state.dtype) * scale, v.to(state.dtype), g.to(state.dtype).exp()
    o = torch.zeros_like(v)
    for n, slot in enumerate(range(len(q)) if slots is None else slots.tolist()):
        if slot >= 0:
            own = state[slot].mul_(decay[n, 0, :, None, None])
            own.addcmul_(k[n, 0, :, :, None], v[n, 0, :, None, :])
            o[n, 0] = (q[n, 0, :, None, :] @ own)[:, 0]
    return o
