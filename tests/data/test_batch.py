"""A batch on the host: what is counted and cut."""

from __future__ import annotations

from itertools import chain

import torch
from hypothesis import given
from hypothesis import strategies as st

from oncelm.data.batch import TrainBatch


def test_targets_are_all_but_first_tokens_or_those_with_labels() -> None:
    tokens = torch.arange(12).view(2, 6)
    assert TrainBatch(tokens).num_targets == 10
    assert TrainBatch(tokens, lengths=(2, 4, 6)).num_targets == 9
    labels = torch.full_like(tokens, -100)
    labels[1, 3:5] = 0
    assert TrainBatch(tokens, labels, (2, 4, 6)).num_targets == 2


@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_parts_are_the_whole(rows: int, count: int, data) -> None:
    tokens = torch.arange(rows * 6).view(rows, 6)
    borders = [data.draw(st.sets(st.integers(1, 5))) | {6} for _ in range(rows)]
    lengths = [torch.tensor([0, *sorted(inside)]).diff().tolist() for inside in borders]
    whole = TrainBatch(tokens, tokens + 1, tuple(chain(*lengths)))
    parts = whole.split(count)
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    assert torch.equal(torch.cat([part.labels for part in parts]), whole.labels)
    assert [part.lengths for part in parts] == [
        tuple(chain(*lengths[start : start + count])) for start in range(0, rows, count)
    ]
    assert whole.cu_seqlens.tolist()[-1] == rows * 6
