"""The gated delta rule for a few new tokens a sequence, in place: the form of decoding.

Nothing depends on values that a GPU would have to be waited for: a CUDA graph may hold the call.
"""

from __future__ import annotations

import torch

from oncelm.ops.dispatch import implementation
from oncelm.ops.linear_attention import check_step

__all__ = ["gated_delta_step"]


def gated_delta_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    slots: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Append T tokens to each of N sequences; `state` is changed in place.

    Args:
        q, k: [N, T, H, K]; v: [N, T, H, V]; g: [N, T, H] log decay; beta: [N, T, H] write strength. See `gated_delta`.
        state: [S, H, K, V] float32, contiguous; the states of S slots.
        slots: [N] integers on the state's device, the slot of each sequence, all different; negative ones are idle
            (nothing is changed, the output is undefined). None: sequence n is slot n.
        kept: [N] integers, how many of its tokens move each state; those behind them see what came before, and leave no
            trace (speculative drafts). None: all.
        scale: factor on q; None means K ** -0.5.
        backend: "auto", "triton" or "naive".

    Returns:
        o [N, T, H, V] in v's dtype.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_step(q, k, v, {"g": g, "beta": beta}, state, slots, kept)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return implementation("gated_delta_step", backend, q.device)(q, k, v, g, beta, state, slots, kept, scale)
