"""The loss with a vocabulary split over ranks is that of one rank."""

from __future__ import annotations

import pytest
import torch

from oncelm.ops import linear_cross_entropy
from tests.train.parallel.cases import split_vocabulary
from tests.train.ranks import run_ranks


@pytest.mark.parametrize(("rows", "vocab_size"), [(7, 10), (1, 2), (0, 4), (5, 11)])
def test_loss_and_gradients(rows: int, vocab_size: int) -> None:
    torch.manual_seed(0)
    hidden, weight = 3 * torch.randn(rows, 6).double(), torch.randn(vocab_size, 6).double()
    targets = torch.randint(vocab_size, (rows,))
    found = run_ranks(2, split_vocabulary, hidden, weight, targets)
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    (2 * loss).backward()
    for results in found:
        for result, expected in zip(results, (loss.detach(), hidden.grad, weight.grad), strict=True):
            torch.testing.assert_close(result, expected, atol=1e-12, rtol=1e-12)
