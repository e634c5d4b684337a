"""The chunkwise form: one triangular system a chunk of CHUNK_SIZE tokens, recurrent across chunks; linear in T."""

from __future__ import annotations

import torch

from oncelm.ops.linear_attention import split_chunks

CHUNK_SIZE = 64


def chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """With chunks of C tokens, G the running sum of g inside a chunk and S the state before it:

    u  = (I + A)^-1 beta (v - exp(G) k S)              A = beta k k^T * exp(G_i - G_j), strictly lower triangle
    o  = scale (q k^T * exp(G_i - G_j), lower triangle) u + scale exp(G) q S
    S' = exp(G_C) S + (exp(G_C - G) k)^T u
    """
    T, V = q.shape[1], v.shape[-1]
    C = min(chunk_size, max(T, 1))
    q, k, v, g, beta = (split_chunks(x, C) for x in (q, k, v, g, beta))  # [B, H, N, C, *]; padding writes nothing
    q, total = q * scale, g.cumsum(-1)[..., None]  # G [B, H, N, C, 1]
    future = torch.ones(C, C, dtype=torch.bool, device=g.device).triu(1)
    # masked before exp: exp of a future difference may overflow, and inf * 0 is NaN in the backward pass
    decay = (total - total.mT).masked_fill(future, -torch.inf).exp()
    k_beta = k * beta[..., None]
    system = (k_beta @ k.mT).to(decay.dtype) * decay  # A; its diagonal counts as ones below
    right = torch.cat((v * beta[..., None], k_beta * total.exp()), dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    own, of_state = solved[..., :V], solved[..., V:]  # u = own - of_state S

    last = total[..., -1:, :]
    to_end, decays = (k * (last - total).exp()).mT, last.exp()
    shape = (*k.shape[:2], k.shape[-1], V)
    state = k.new_zeros(shape) if initial_state is None else initial_state.to(k.dtype)
    before, changes = [], []
    for n in range(k.shape[2]):
        before.append(state)
        changes.append(own[:, :, n] - of_state[:, :, n] @ state)
        state = state * decays[:, :, n] + to_end[:, :, n] @ changes[-1]
    u, states = torch.stack(changes, dim=2), torch.stack(before, dim=2)
    o = (q @ k.mT * decay) @ u + (q * total.exp()) @ states
    return o.flatten(2, 3)[:, :, :T].transpose(1, 2), state
