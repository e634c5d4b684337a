"""All tokens at once: the inputs, shifted once a tap, times that tap."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def shifts(
    x: torch.Tensor, weight: torch.Tensor, state: torch.Tensor, cu_seqlens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [B, T, D], weight [D, W], state [N, W - 1, D] -> y [B, T, D], final state. Nothing waits for the device.

    Packed sequences become one row in which each stands behind its own state; outputs and final states are picked
    from there.
    """
    if cu_seqlens is None:
        inputs = torch.cat((state, x), dim=1)  # [B, W - 1 + T, D]
        return _convolve(inputs, weight), inputs[:, x.shape[1] :]
    N, before, _ = state.shape
    # nobody has looked at their values on a GPU: wrong borders give wrong results, never a wild access
    cu_seqlens = cu_seqlens.to(x.device, torch.long).clamp(0, x.shape[1]).cummax(0).values
    ends = cu_seqlens[1:].contiguous()
    tokens = torch.arange(x.shape[1], device=x.device)
    sequence = torch.searchsorted(ends, tokens, right=True).clamp(max=N - 1)  # of each token
    # where the new row's inputs come from, in a list of all states and behind them all tokens
    own_states = torch.arange(before, device=x.device)
    token_places = tokens + (sequence + 1) * before
    state_places = (cu_seqlens[:-1, None] + torch.arange(N, device=x.device)[:, None] * before) + own_states
    order = tokens.new_zeros(N * before + x.shape[1])
    order[state_places.flatten()] = torch.arange(N * before, device=x.device)
    order[token_places] = N * before + tokens
    inputs = torch.cat((state.flatten(0, 1), x[0])).index_select(0, order)
    y = _convolve(inputs[None], weight).index_select(1, token_places - before)
    last = ends[:, None] + torch.arange(N, device=x.device)[:, None] * before + own_states  # the W - 1 before its end
    return y, inputs.index_select(0, last.flatten()).unflatten(0, (N, before))


def _convolve(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[B, W - 1 + T, D] -> [B, T, D] in float32 or wider."""
    W = weight.shape[1]
    T = inputs.shape[1] - W + 1
    weight = weight.to(torch.promote_types(torch.promote_types(inputs.dtype, weight.dtype), torch.float32))
    y = inputs[:, :T] * weight[:, 0]
    for tap in range(1, W):
        y = torch.addcmul(y, inputs[:, tap : tap + T], weight[:, tap])
    return F.silu(y)
