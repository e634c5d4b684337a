"""Which positions are computed, and how loss and logits are read from them: at once and window by window."""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oncelm import LongLlamaForCausalLM, YocoForCausalLM
from oncelm.models.inputs import IGNORE_INDEX, NOTHING, Inputs
from oncelm.models.wanted import Wanted

B, T, D, V = 2, 7, 3, 11
KEEPS = ["all", "last", "index", "mask", "nothing"]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def make_keep(name: str, real: torch.Tensor | None) -> int | torch.Tensor | None:
    mask = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) < 0.4
    return {
        "all": None,
        "last": 2,
        "index": torch.tensor([5, -1, 0, 3]),
        "mask": mask if real is None else mask & real,
        "nothing": NOTHING,
    }[name]


def expected_logits(name: str, hidden: torch.Tensor, keep: int | torch.Tensor | None) -> torch.Tensor | None:
    if name == "nothing":
        return None
    if name == "mask":
        return hidden[keep]
    return hidden[:, {"all": slice(None), "last": slice(T - 2, T)}.get(name, keep)]


@given(
    name=st.sampled_from(KEEPS),
    padded=st.booleans(),
    learned=st.sampled_from(["none", "plain", "some"]),
    cuts=st.sets(st.integers(1, T - 1), max_size=2),
)
def test_windows_and_one_piece_give_what_is_asked_for(name: str, padded: bool, learned: str, cuts: set[int]) -> None:
    if name == "nothing" and learned == "none":
        return
    real = torch.ones(B, T, dtype=torch.bool)
    if padded:
        real[0, :2], real[1, 3] = False, False
    inputs = Inputs.of_rows((0,) * B, real if padded else None, T, torch.device("cpu"))
    hidden = draw(B, T, D) * real[..., None]
    targets = None
    if learned != "none":
        targets = torch.arange(B * T).view(B, T) % V
        targets[:, -1] = IGNORE_INDEX
        if learned == "some":
            targets[0, 2:4] = IGNORE_INDEX
        targets = targets.masked_fill(~real, IGNORE_INDEX)
    keep = make_keep(name, real if padded else None)
    bounds = [0, *sorted(cuts), T]
    windows = [slice(first, stop) for first, stop in pairwise(bounds)]
    for pieces in (windows, None):
        wanted = Wanted(inputs, keep, targets, V)
        rows, found = [], []
        for columns in pieces or [slice(0, T)]:
            # what a model that computes whole windows hands over, or one that computes the wanted positions alone
            part = (
                wanted.within(columns, hidden[:, columns]) if pieces else wanted.selection.take(inputs.gather(hidden))
            )
            if targets is not None:
                for into, x in zip((rows, found), wanted.learned(columns, part), strict=True):
                    into.append(x)
            wanted.keep(columns, part)
        logits, expected = wanted.hidden(), expected_logits(name, hidden, keep)
        assert (logits is None) == (expected is None)
        if logits is not None:
            torch.testing.assert_close(logits, expected, rtol=0, atol=0)
        if targets is not None:
            counted = targets != IGNORE_INDEX
            assert wanted.num_targets == counted.sum()
            pairs = sorted(zip(torch.cat(found).tolist(), torch.cat(rows).tolist(), strict=True))
            assert pairs == sorted(zip(targets[counted].tolist(), hidden[counted].tolist(), strict=True))


def test_all_positions_are_computed_where_something_else_needs_them() -> None:
    inputs = Inputs.of_rows((0,) * B, None, T, torch.device("cpu"))
    wanted, x = Wanted(inputs, 1, everywhere=True), draw(B, T, D)
    assert torch.equal(wanted.selection.take(x), x)
    assert torch.equal(wanted.within(slice(0, T), x), x[:, -1:])


@pytest.mark.parametrize("model", [YocoForCausalLM, LongLlamaForCausalLM])
def test_signatures_name_what_a_family_takes(model: type) -> None:
    """Trainer, generate and PEFT look there."""
    names = list(inspect.signature(model.forward).parameters)
    assert names[:3] == ["self", "input_ids", "attention_mask"]
    assert {"position_ids", "labels", "num_items_in_batch", "logits_to_keep", *model.own_arguments} < {*names}
    assert names[-1] == "kwargs"
