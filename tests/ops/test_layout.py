"""Kernels read rows from multiples of 16 bytes on; what lies elsewhere is copied, the rest is not."""

from __future__ import annotations

import pytest
import torch

from oncelm.ops.layout import aligned


def whole() -> torch.Tensor:
    return torch.arange(2 * 6 * 4 * 16, dtype=torch.bfloat16).view(2, 6, 4, 16)


VIEWS = {
    "whole": lambda x: x,
    "some rows": lambda x: x[:, 2:5],
    "transposed": lambda x: x.transpose(1, 2),
    "half of the last": lambda x: x[..., 8:],
    "expanded": lambda x: x[:, :1].expand(2, 6, 4, 16),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_aligned_views_are_left_alone(view) -> None:
    x = view(whole())
    assert aligned(x) is x


@pytest.mark.parametrize("view", [lambda x: x[..., 1:9], lambda x: x[..., ::2], lambda x: x.transpose(2, 3)])
def test_others_are_copied(view) -> None:
    x = view(whole())
    copy = aligned(x)
    assert copy.is_contiguous()
    assert copy.storage_offset() == 0
    assert torch.equal(copy, x)


def test_odd_heads_are_copied_once() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert aligned(x) is x
    assert aligned(x[:, 1:]).is_contiguous()


def test_traces_into_one_graph() -> None:
    x = torch.randn(1, 4, 2, 9)
    found = torch.compile(lambda x: aligned(x[..., 1:]) * 2, fullgraph=True, backend="eager")(x)
    assert torch.equal(found, x[..., 1:] * 2)
