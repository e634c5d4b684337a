"""What gated retention and the gated delta rule share: checks of their inputs, their call, and the cut into chunks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from oncelm.ops.dispatch import choose
from oncelm.ops.dtypes import one_dtype
from oncelm.ops.packed import by_sequence, count_sequences


def scan(
    op: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: dict[str, torch.Tensor],
    scale: float | None,
    initial_state: torch.Tensor | None,
    output_final_state: bool,
    cu_seqlens: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `op` returns for these arguments; its backends take the gates [B, T, H] in their order."""
    check_inputs(q, k, v, gates, initial_state, cu_seqlens)
    if backend == "auto" and q.shape[1] == 1 and cu_seqlens is None:
        backend = "recurrent"
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out_dtype = v.dtype
    q, k, v = one_dtype(q, k, v)
    inputs = (q, k, v, *(gate.to(torch.promote_types(q.dtype, torch.float32)) for gate in gates.values()))
    chosen = choose(op, backend, q.device)
    if chosen.packed:
        o, final_state = chosen.load()(*inputs, scale, initial_state, cu_seqlens)
    else:
        o, final_state = by_sequence(chosen.load(), inputs, (scale,), initial_state, cu_seqlens)
    return o.to(out_dtype), (final_state if output_final_state else None)


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
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gates: dict[str, torch.Tensor],
    state: torch.Tensor,
    slots: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the inputs of a few tokens of N sequences fit together, and states [S, H, K, V] that
    change in place: those in `slots` [N], or all in order, by the first `kept` [N] tokens, or by all."""
    fits = q.dim() == 4 and v.dim() == 4 and k.shape == q.shape and v.shape[:3] == q.shape[:3]
    if not fits or any(gate.shape != q.shape[:3] for gate in gates.values()):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, *gates.values()))
        names = " and ".join(gates)
        raise ValueError(f"q, k [N, T, H, K], v [N, T, H, V] and {names} [N, T, H] do not fit together: {shapes}.")
    expected = (*q.shape[2:], v.shape[3])
    if state.shape[1:] != expected or state.dtype != torch.float32 or not state.is_contiguous():
        sizes = ", ".join(map(str, expected))
        raise ValueError(f"state must be contiguous float32 [*, {sizes}], got {state.dtype} {tuple(state.shape)}.")
    check_slots(state, slots, kept, q.shape[0])


def check_slots(state: torch.Tensor, slots: torch.Tensor | None, kept: torch.Tensor | None, N: int) -> None:
    """Raise ValueError unless there is a slot, or without slots a row of `state`, for each of N sequences."""
    if slots is None and state.shape[0] != N:
        raise ValueError(f"without slots, state must have one row a sequence: {state.shape[0]} rows, {N} sequences.")
    if slots is not None and slots.shape != (N,):
        raise ValueError(f"slots must be [N] = [{N}], got {tuple(slots.shape)}.")
    if kept is not None and kept.shape != (N,):
        raise ValueError(f"kept must be [N] = [{N}], got {tuple(kept.shape)}.")


def update(
    recurrent: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    inputs: tuple[torch.Tensor, ...],
    scale: float,
    state: torch.Tensor,
    slots: torch.Tensor | None,
    kept: torch.Tensor | None,
) -> torch.Tensor:
    """o of `recurrent(*inputs, scale, states)`, whose new states take the old ones' places; negative slots stay."""

    def run(old: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if kept is None:
            return recurrent(*inputs, scale, old)
        outputs, stored = [], old
        for t in range(inputs[0].shape[1]):
            o, old = recurrent(*(x[:, t : t + 1] for x in inputs), scale, old)
            stored = torch.where((kept > t)[:, None, None, None], old, stored)
            outputs.append(o)
        return torch.cat(outputs, dim=1), stored

    if slots is None:
        o, final_state = run(state)
        state.copy_(final_state)
        return o
    busy = slots >= 0
    if bool(busy.all()):
        o, final_state = run(state[slots])
        state[slots] = final_state.to(state.dtype)
        return o
    o, final_state = run(state[slots.clamp(min=0)])
    state[slots[busy]] = final_state[busy].to(state.dtype)
    return o


def split_chunks(x: torch.Tensor, C: int) -> torch.Tensor:
    """[B, T, H, *] -> [B, H, N, C, *] contiguous, in float32 or wider, zeros behind T."""
    x = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2)
    short = -x.shape[2] % C if x.shape[2] else C
    if short:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, short))
    return x.unflatten(2, (-1, C)).contiguous()
