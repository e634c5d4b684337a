"""Gated retention of a few new tokens a sequence, in place: the form of decoding.

The states of all sequences are in one tensor, and a sequence is identified by its slot in it, so that an engine can
start, stop and reorder sequences without moving states. Nothing waits for a value from the GPU, so a CUDA graph can
record the call.
"""

from __future__ import annotations

import torch

from oncelm.ops.dispatch import implementation
from oncelm.ops.linear_attention import check_step

__all__ = ["gated_retention_step"]


def gated_retention_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor,
    *,
    slots: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Append T tokens to each of N sequences; `state` is changed in place.

    Args:
        q, k: [N, T, H, K], rotated; v: [N, T, H, V]; g: [N, T, H] log decay, float32.
        state: [S, H, K, V] float32, contiguous; the states of S slots.
        slots: [N] integers on the state's device, the slot of each sequence, all different; negative ones are idle
            (nothing is changed, the output is undefined). None: sequence n is slot n.
        kept: [N] integers, how many of its tokens move each state; those behind them see what came before, and leave no
            trace (speculative drafts). None: all.
        scale: factor on k^T v; None means K ** -0.5.
        backend: "auto", "triton" or "naive".

    Returns:
        o [N, T, H, V] in v's dtype.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_step(q, k, v, {"g": g}, state, slots, kept)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return implementation("gated_retention_step", backend, q.device)(q, k, v, g, state, slots, kept, scale)
