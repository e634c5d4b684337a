"""Which tokens are picked, and whether they stand side by side; packed attention over picked queries."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from oncelm.cache.batch import Batch
from oncelm.cache.yoco.shared_kv import FreshShared
from oncelm.ops import global_attention

CPU = torch.device("cpu")


def lay_out(lengths: list[int], dense: bool) -> Batch:
    if dense:
        return Batch.dense((0,) * len(lengths), max(lengths), CPU)
    return Batch.packed((0,) * len(lengths), tuple(lengths), CPU)


@st.composite
def picked(draw):
    """A batch, and a mask of its tokens that often picks runs."""
    dense = draw(st.booleans())
    lengths = draw(st.lists(st.integers(0, 12), min_size=1, max_size=4).filter(any))
    batch = lay_out(lengths, dense)
    rows = []
    for length in batch.lengths:
        if draw(st.booleans()):
            first = draw(st.integers(0, length))
            last = draw(st.integers(first, length))
            rows.append([first <= i < last for i in range(length)])
        else:
            rows.append(draw(st.lists(st.booleans(), min_size=length, max_size=length)))
    mask = torch.tensor(rows if dense else [list(chain(*rows))])
    return batch, rows, mask


@settings(max_examples=100, deadline=None)
@given(case=picked())
def test_runs_are_found(case) -> None:
    batch, rows, mask = case
    found = batch.pick(mask).batch
    places = [[i for i, there in enumerate(row) if there] for row in rows]
    assert found.lengths == tuple(map(len, places))
    assert found.positions[0].tolist() == list(chain(*places))
    assert found.contiguous == all(p == list(range(p[0], p[0] + len(p))) for p in places if p)
    if found.contiguous:
        assert [start for start, p in zip(found.starts, places, strict=True) if p] == [p[0] for p in places if p]


@settings(max_examples=60, deadline=None)
@given(case=picked())
def test_picked_queries_see_what_all_queries_see(case) -> None:
    batch, _, mask = case
    assume(mask.any())
    B, T = batch.positions.shape if batch.cu_seqlens is not None else (batch.num_sequences, batch.lengths[0])
    q, k, v = (torch.randn(B, T, heads, 8, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2))
    shared = FreshShared()
    shared.append(k, v, batch)
    selection = batch.pick(mask)
    results = []
    for out in (
        shared.attend(selection.take(q), selection.batch),
        selection.take(
            batch.join([global_attention(*(x[group.where] for x in (q, k, v))) for group in batch.groups()])
        ),
    ):
        results.append((out.detach(), *torch.autograd.grad(out.sin().sum(), (q, k, v))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dense", [True, False])
def test_layers_share_one_plan(dense: bool) -> None:
    batch = lay_out([5, 5], dense)
    k, v = (torch.randn(2 if dense else 1, 5 if dense else 10, 2, 8) for _ in "kv")
    shared = FreshShared()
    shared.append(k, v, batch)
    mask = torch.ones(k.shape[:2], dtype=torch.bool)
    mask[0, -1] = False
    selection = batch.pick(mask)
    shared.attend(selection.take(k), selection.batch)
    plan = shared.plan
    shared.attend(selection.take(k), selection.batch)
    assert shared.plan is plan
