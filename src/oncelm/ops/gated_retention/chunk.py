"""The chunkwise form: quadratic inside chunks of CHUNK_SIZE tokens, recurrent across them; linear in T."""

from __future__ import annotations

import torch

from oncelm.ops.linear_attention import split_chunks

CHUNK_SIZE = 128  # fastest of 64, 128, 256 on a 2-core CPU at head dims 128 and 256


def chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """With chunks of C tokens, G the running sum of g inside a chunk and S the state before it:

    o = (q k^T * exp(G_i - G_j) * scale, lower triangle) v + exp(G) q S
    S' = exp(G_C) S + (exp(G_C - G) k * scale)^T v
    """
    T = q.shape[1]
    C = min(chunk_size, max(T, 1))
    q, k, v, g = (split_chunks(x, C) for x in (q, k, v, g))  # [B, H, N, C, *]; padding has k = 0 and g = 0: no effect
    total = g.cumsum(-1)  # G
    future = torch.ones(C, C, dtype=torch.bool, device=g.device).triu(1)
    # masked before exp: exp of a future difference may overflow, and inf * 0 is NaN in the backward pass
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(future, -torch.inf).exp()
    k = k * scale
    within = (q @ k.mT * decay) @ v

    last = total[..., -1:]
    updates = (k * (last - total).exp()[..., None]).mT @ v  # [B, H, N, K, V]
    decays = last.exp()[..., None]  # [B, H, N, 1, 1]
    state = torch.zeros_like(updates[:, :, 0]) if initial_state is None else initial_state.to(updates.dtype)
    before = []
    for n in range(updates.shape[2]):
        before.append(state)
        state = state * decays[:, :, n] + updates[:, :, n]
    o = within + (q * total.exp()[..., None]) @ torch.stack(before, dim=2)
    return o.flatten(2, 3)[:, :, :T].transpose(1, 2), state
