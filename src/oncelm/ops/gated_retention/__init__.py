"""Gated retention: linear attention with a data-dependent scalar decay per head (YOCO, arXiv 2405.05254, section 3.1).

For each sequence and head, with log decay g_t <= 0:

    S_t = exp(g_t) S_{t-1} + scale * k_t^T v_t        S [K, V], float32
    o_t = q_t S_t

README.md beside this file derives the three forms; they agree to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from oncelm.ops.dispatch import choose
from oncelm.ops.dtypes import one_dtype

__all__ = ["gated_retention"]


def gated_retention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated retention over a batch of sequences, or over packed sequences.

    Args:
        q, k: [B, T, H, K], any floating dtype, already rotated; of several dtypes the widest is computed in.
        v: [B, T, H, V].
        g: [B, T, H] log decay, at most 0; float32 is advised.
        scale: factor on k^T v; None means K ** -0.5.
        initial_state: [N, H, K, V] state before the first token; None means zeros. N is B, or the number of
            packed sequences.
        output_final_state: also return the state after the last token of each sequence.
        cu_seqlens: [N + 1] int, cumulative lengths of N sequences packed along T (then B must be 1); empty
            sequences are allowed. On a GPU only its shape is checked: reading the values would wait for the device.
        backend: "auto", "triton", "chunk", "recurrent" or "naive" (see `oncelm info`).

    Returns:
        o [B, T, H, V] in v's dtype, and the final state [N, H, K, V] (float32; float64 for float64 inputs) or None.

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
    """
    _check(q, k, v, g, initial_state, cu_seqlens)
    if backend == "auto" and q.shape[1] == 1 and cu_seqlens is None:
        backend = "recurrent"
    chosen = choose("gated_retention", backend, q.device)
    compute = chosen.load()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out_dtype = v.dtype
    q, k, v = one_dtype(q, k, v)
    g = g.to(torch.promote_types(q.dtype, torch.float32))
    if cu_seqlens is None:
        o, final_state = compute(q, k, v, g, scale, initial_state)
    elif chosen.packed:
        o, final_state = compute(q, k, v, g, scale, initial_state, cu_seqlens)
    else:
        o, final_state = by_sequence(compute, q, k, v, g, scale, initial_state, cu_seqlens)
    return o.to(out_dtype), (final_state if output_final_state else None)


def by_sequence(
    compute: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each packed sequence on its own; sequences of one length in one batch."""
    bounds = cu_seqlens.tolist()
    _check_borders("cu_seqlens", bounds, q.shape[1])
    lengths = [end - start for start, end in pairwise(bounds)]
    if lengths and lengths[0] > 0 and len(set(lengths)) == 1:
        batched = (x.unflatten(1, (len(lengths), lengths[0])).squeeze(0) for x in (q, k, v, g))
        o, final_state = compute(*batched, scale, initial_state)
        return o.flatten(0, 1).unsqueeze(0), final_state
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        state = None if initial_state is None else initial_state[n : n + 1]
        o, final_state = compute(*(x[:, start:end] for x in (q, k, v, g)), scale, state)
        outputs.append(o)
        states.append(final_state)
    return torch.cat(outputs, dim=1), torch.cat(states)


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    if q.dim() != 4 or k.shape != q.shape:
        raise ValueError(f"q and k must both be [B, T, H, K], got {tuple(q.shape)} and {tuple(k.shape)}.")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v must be [B, T, H, V] with q's B, T, H {tuple(q.shape[:3])}, got {tuple(v.shape)}.")
    if g.shape != q.shape[:3]:
        raise ValueError(f"g must be [B, T, H] = {tuple(q.shape[:3])}, got {tuple(g.shape)}.")
    sequences = q.shape[0]
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(f"packed sequences (cu_seqlens) need batch size 1, got {q.shape[0]}.")
        check_cu_seqlens("cu_seqlens", cu_seqlens, q.shape[1])
        sequences = cu_seqlens.numel() - 1
    expected = (sequences, q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and initial_state.shape != expected:
        raise ValueError(f"initial_state must be [N, H, K, V] = {expected}, got {tuple(initial_state.shape)}.")


def check_cu_seqlens(name: str, cu_seqlens: torch.Tensor, total: int) -> None:
    """Raise ValueError unless `cu_seqlens` is a vector of integers that, on a CPU, rises from 0 to `total`."""
    if cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {cu_seqlens.dtype}.")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2:
        raise ValueError(
            f"{name} must hold the borders of at least one sequence, a vector [0, ..., {total}], got shape "
            f"{tuple(cu_seqlens.shape)}."
        )
    if cu_seqlens.device.type == "cpu":  # where reading the values does not wait for the device
        _check_borders(name, cu_seqlens.tolist(), total)


def _check_borders(name: str, bounds: list[int], total: int) -> None:
    if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"{name} must rise from 0 to the number of tokens {total}, got {bounds[:8]}.")
