"""Sequences packed along T: checks of their borders, and ops with a state computed one sequence after the other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch


def by_sequence(
    compute: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    inputs: tuple[torch.Tensor, ...],
    constants: tuple[Any, ...],
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """compute(*inputs, *constants, state) -> (o, final state) of each sequence; those of one length in one batch.

    inputs: each [1, T, ...], without cu_seqlens [N, T, ...]; states: [N, ...] for N sequences.
    """
    if cu_seqlens is None:
        return compute(*inputs, *constants, initial_state)
    bounds = cu_seqlens.tolist()
    check_borders("cu_seqlens", bounds, inputs[0].shape[1])
    lengths = [end - start for start, end in pairwise(bounds)]
    if lengths and lengths[0] > 0 and len(set(lengths)) == 1:
        batched = (x.unflatten(1, (len(lengths), lengths[0])).squeeze(0) for x in inputs)
        o, final_state = compute(*batched, *constants, initial_state)
        return o.flatten(0, 1).unsqueeze(0), final_state
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        state = None if initial_state is None else initial_state[n : n + 1]
        o, final_state = compute(*(x[:, start:end] for x in inputs), *constants, state)
        outputs.append(o)
        states.append(final_state)
    return torch.cat(outputs, dim=1), torch.cat(states)


def count_sequences(x: torch.Tensor, cu_seqlens: torch.Tensor | None) -> int:
    """How many sequences x [B, T, ...] holds; ValueError where cu_seqlens do not fit it."""
    if cu_seqlens is None:
        return x.shape[0]
    if x.shape[0] != 1:
        raise ValueError(f"packed sequences (cu_seqlens) need batch size 1, got {x.shape[0]}.")
    check_cu_seqlens("cu_seqlens", cu_seqlens, x.shape[1])
    return cu_seqlens.numel() - 1


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
        check_borders(name, cu_seqlens.tolist(), total)


def check_borders(name: str, bounds: list[int], total: int) -> None:
    """Raise ValueError unless `bounds` rise from 0 to `total`."""
    if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"{name} must rise from 0 to the number of tokens {total}, got {bounds[:8]}.")
