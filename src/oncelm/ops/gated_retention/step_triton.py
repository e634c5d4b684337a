"""Gated retention of a few new tokens, in Triton: each state is read once and written once, where it stands."""

# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from oncelm.ops import gpu


@triton.jit
def step_kernel(
    q, k, v, g, state, slots, kept, o, scale, T,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK columns of one head's state of one sequence, over its T tokens."""
    blocks: tl.constexpr = (V + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    n, head, block = program // (H * blocks), program // blocks % H, program % blocks
    slot = n.to(tl.int64)
    if slots is not None:
        slot = tl.load(slots + n).to(tl.int64)
        if slot < 0:
            return
    rows, columns = tl.arange(0, KP), block * BLOCK + tl.arange(0, BLOCK)
    places = state + (slot * H + head) * K * V + rows[:, None] * V + columns[None, :]
    inside = (rows < K)[:, None] & (columns < V)[None, :]
    s = tl.load(places, mask=inside, other=0.0)  # [KP, BLOCK]
    if kept is not None:
        last = tl.load(kept + n).to(tl.int32) - 1
    for t in range(T):
        token = (n * T + t) * H + head
        decay = tl.exp(tl.load(g + token).to(tl.float32))
        key = tl.load(k + token * K + rows, mask=rows < K, other=0.0).to(tl.float32) * scale
        query = tl.load(q + token * K + rows, mask=rows < K, other=0.0).to(tl.float32)
        value = tl.load(v + token * V + columns, mask=columns < V, other=0.0).to(tl.float32)
        s = s * decay + key[:, None] * value[None, :]
        out = tl.sum(query[:, None] * s, 0)
        tl.store(o + token * V + columns, out.to(o.dtype.element_ty), mask=columns < V)
        if kept is not None:  # noqa: SIM102 - the first is known when this is compiled
            if t == last:
                tl.store(places, s, mask=inside)
    if kept is None:
        tl.store(places, s, mask=inside)


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
    """q, k [N, T, H, K], v [N, T, H, V], g [N, T, H], state [S, H, K, V] changed in place -> o [N, T, H, V]."""
    N, T, H, K = q.shape
    V = v.shape[-1]
    q, k, v, g = (x.contiguous() for x in (q, k, v, g))
    slots, kept = (None if x is None else x.contiguous() for x in (slots, kept))
    o = torch.empty_like(v)
    block = min(32, triton.next_power_of_2(V))
    with gpu.on(q):
        step_kernel[(N * H * triton.cdiv(V, block),)](
            q, k, v, g, state, slots, kept, o, scale, T,
            H=H, K=K, V=V, KP=triton.next_power_of_2(K), BLOCK=block, num_warps=4,
        )  # fmt: skip
    return o
