"""What gated retention and the gated delta rule share: checks of their inputs, and the cut into chunks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from oncelm.ops.packed import count_sequences


def check_inputs(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: dict[str, torch.Tensor],
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """Raise ValueError unless q, k are [B, T, H, K], v [B, T, H, V], gates [B, T, H] and the state [N, H, K, V]."""
    if q.dim() != 4 or k.shape != q.shape:
        raise ValueError(f"q and k must both be [B, T, H, K], got {tuple(q.shape)} and {tuple(k.shape)}.")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with q's B, T, H {tuple(q.shape[:3])}, got {tuple(v.shape)}.")
    for name, gate in gates.items():
        if gate.shape != q.shape[:3]:
            raise ValueError(f"{name} must be [B, T, H] = {tuple(q.shape[:3])}, got {tuple(gate.shape)}.")
    expected = (count_sequences(q, cu_seqlens), q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state must be [N, H, K, V] = {expected}, got {tuple(initial_state.shape)}.")


def check_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: dict[str, torch.Tensor], state: torch.Tensor
) -> None:
    """Raise ValueError unless the inputs of a few tokens fit together, and states [*, H, K, V] that change in place."""
    fits = q.dim() == 4 and v.dim() == 4 and k.shape == q.shape and v.shape[:3] == q.shape[:3]
    if not fits or any(gate.shape != q.shape[:3] for gate in gates.values()):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, *gates.values()))
        names = " and ".join(gates)
        raise ValueError(f"q, k [N, T, H, K], v [N, T, H, V] and {names} [N, T, H] do not fit together: {shapes}.")
    expected = (*q.shape[2:], v.shape[3])
    if state.shape[1:] != expected or state.dtype != torch.float32 or not state.is_contiguous():
        sizes = ", ".join(map(str, expected))
        raise ValueError(f"state must be contiguous float32 [*, {sizes}], got {state.dtype} {tuple(state.shape)}.")


def split_chunks(x: torch.Tensor, C: int) -> torch.Tensor:
    """[B, T, H, *] -> [B, H, N, C, *] contiguous, in float32 or wider, zeros behind T."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2)
    short = -x.shape[2] % C if x.shape[2] else C
    if short:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, short))
    return x.unflatten(2, (-1, C)).contiguous()
