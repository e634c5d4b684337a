"""A causal convolution of a few taps over each channel alone, then silu, as before the queries, keys and values of
linear attention (Mamba, arXiv 2312.00752; Gated DeltaNet, arXiv 2412.06464). With W taps w_0 to w_{W-1} a channel:

    y_t = silu(w_0 x_{t-W+1} + ... + w_{W-1} x_t)

What it remembers of a sequence, its state, is the last W - 1 inputs: zeros before the first token.
"""

from __future__ import annotations

import torch

from oncelm.ops.dispatch import choose
from oncelm.ops.linear_attention import check_slots
from oncelm.ops.packed import by_sequence, count_sequences

__all__ = ["short_convolution", "short_convolution_step"]


def short_convolution(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """silu of the causal convolution of a batch of sequences, or of packed sequences.

    Args:
        x: [B, T, D], any floating dtype; computed in float32 or wider.
        weight: [D, W], the last tap is the token's own.
        initial_state: [N, W - 1, D] inputs before the first token; None means zeros. N is B, or the number of packed
            sequences.
        output_final_state: also return the last W - 1 inputs of each sequence.
        cu_seqlens: [N + 1] int, cumulative lengths of N sequences packed along T (then B must be 1); empty
            sequences are allowed. On a GPU only its shape is checked: reading the values would wait for the device.
        backend: "auto", "fla", "shifts" or "naive" (see `oncelm info`).

    Returns:
        y [B, T, D] and the final state [N, W - 1, D] or None, both in x's dtype.

    Raises:
        ValueError: shapes that do not fit together, or an unknown backend.
    """
    _check(x, weight)
    expected = (count_sequences(x, cu_seqlens), weight.shape[1] - 1, x.shape[2])
    if initial_state is None:
        initial_state = x.new_zeros(expected)
    elif initial_state.shape != expected:
        raise ValueError(f"initial_state must be [N, W - 1, D] = {expected}, got {tuple(initial_state.shape)}.")
    chosen = choose("short_convolution", backend, x.device)
    state = initial_state.to(x.dtype)
    if chosen.packed:
        y, final_state = chosen.load()(x, weight, state, cu_seqlens)
    else:
        y, final_state = by_sequence(chosen.load(), (x,), (weight,), state, cu_seqlens)
    return y.to(x.dtype), (final_state if output_final_state else None)


def short_convolution_step(
    x: torch.Tensor,
    weight: torch.Tensor,
    state: torch.Tensor,
    *,
    slots: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """Append T tokens to each of N sequences; `state` is changed in place. A CUDA graph may hold the call.

    Args:
        x: [N, T, D].
        weight: [D, W].
        state: [S, W - 1, D] in any floating dtype; that of x keeps every digit. The states of S slots.
        slots: [N] integers on the state's device, the slot of each sequence, all different and none negative. None:
            sequence n is slot n.
        kept: [N] integers, how many of its tokens move each state; those behind them see what came before, and leave no
            trace (speculative drafts). None: all.

    Returns:
        y [N, T, D] in x's dtype.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(x, weight)
    expected = (state.shape[0], weight.shape[1] - 1, x.shape[2])
    if state.shape != expected:
        raise ValueError(f"state must be [S, W - 1, D] = {expected}, got {tuple(state.shape)}.")
    check_slots(state, slots, kept, x.shape[0])
    old = (state if slots is None else state[slots]).to(x.dtype)
    y, final_state = choose("short_convolution", "shifts", x.device).load()(x, weight, old)
    if kept is not None:
        rows = torch.arange(len(x), device=x.device)[:, None]
        last = kept[:, None] + torch.arange(old.shape[1], device=x.device)  # the W - 1 before the first that goes
        final_state = torch.cat((old, x), dim=1)[rows, last]
    if slots is None:
        state.copy_(final_state)
    else:
        state[slots] = final_state.to(state.dtype)
    return y.to(x.dtype)


def _check(x: torch.Tensor, weight: torch.Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, D], got {tuple(x.shape)}.")
    if weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(
            f"weight must be [D, W] with x's D = {x.shape[2]} and W of at least 1, got {tuple(weight.shape)}."
        )
