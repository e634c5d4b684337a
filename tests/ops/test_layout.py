"""What kernels cannot read from where it lies is copied, also inside a compiled function."""

from __future__ import annotations

import pytest
import torch

from oncelm.ops.layout import aligned


@pytest.mark.parametrize(
    ("made", "is_copied"),
    [
        (lambda: torch.zeros(1, 4, 2, 8), False),
        (lambda: torch.zeros(1, 4, 2, 16)[..., :8], False),
        (lambda: torch.zeros(1, 4, 2, 9)[..., 1:], True),  # rows begin at odd places
        (lambda: torch.zeros(65)[1:].view(1, 4, 2, 8), True),
        (lambda: torch.zeros(1, 4, 8, 2).transpose(2, 3), True),
    ],
    ids=["whole", "a part of each row", "an odd part", "an odd beginning", "transposed"],
)
def test_copies_just_what_must_be(made, is_copied: bool) -> None:
    x = made()
    found = aligned(x)
    assert (found is not x) == is_copied
    assert torch.equal(found, x)


def test_traces_into_one_graph() -> None:
    x = torch.randn(1, 4, 2, 9)
    found = torch.compile(lambda x: aligned(x[..., 1:]) * 2, fullgraph=True, backend="eager")(x)
    assert torch.equal(found, x[..., 1:] * 2)
