"""The states of recurrent layers: what a mixer may say of them, and what is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from oncelm.cache.batch import Batch
from oncelm.cache.yoco.recurrent_state import RecurrentState

CPU = torch.device("cpu")


def scan(state: RecurrentState, name: str, op: Callable) -> torch.Tensor:
    return state.scan(name, op, (torch.ones(2, 3, 4),), Batch.dense((0, 0), 3, CPU))


def total(x: torch.Tensor, initial_state: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
    sums = initial_state[:, None] + x.cumsum(1)
    return sums, sums[:, -1]


def test_a_state_goes_on_from_what_the_op_returned() -> None:
    state = RecurrentState(2, {"sum": (4,)}, CPU)
    scan(state, "sum", total)
    assert scan(state, "sum", total)[:, -1].tolist() == [[6.0] * 4] * 2


def test_states_that_a_mixer_did_not_declare_so_are_refused() -> None:
    state = RecurrentState(2, {"sum": (4,)}, CPU)
    with pytest.raises(ValueError, match="unknown state 'sun'; did you mean 'sum'"):
        scan(state, "sun", total)
    for returned in (None, torch.ones(4), torch.ones(2, 1)):  # the last two could be stretched
        with pytest.raises(ValueError, match=r"the state 'sum' is \[2, 4\], and what its op returned"):
            scan(state, "sum", lambda x, returned=returned, **kwargs: (x, returned))
    for name in ("history", "record", "two words"):
        with pytest.raises(ValueError, match=f"a state cannot be called '{name}'"):
            RecurrentState(2, {name: (4,)}, CPU)
