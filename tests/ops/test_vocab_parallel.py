"""The loss with a vocabulary split over ranks is that of one rank."""

from __future__ import annotations

import os

import pytest
import torch
from torch.distributed.tensor import Shard, distribute_tensor

from oncelm.ops import linear_cross_entropy, vocab_parallel, vocab_parallel_cross_entropy
from oncelm.train.parallel.mesh import join_mesh
from tests.train.ranks import run_ranks


def split_vocabulary(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor):
    """The loss of a weight split by rows, and both gradients in full."""
    with join_mesh("cpu", tensor=int(os.environ["WORLD_SIZE"])) as mesh:
        sharded = distribute_tensor(weight, mesh.device_mesh["tensor"], [Shard(0)]).requires_grad_()
        hidden.requires_grad_()
        loss = vocab_parallel_cross_entropy(hidden, sharded, targets)
        (2 * loss).backward()
        return loss.detach(), hidden.grad, sharded.grad.full_tensor()


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


def unchecked(*arguments):
    """The loss as on a GPU, where nobody waits to look at the targets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocab_parallel, "check_range", lambda targets, vocabulary: None)
        return split_vocabulary(*arguments)


@pytest.mark.parametrize("target", [-100, -1, 10, 2**31])
def test_a_target_of_no_rank_is_refused_and_never_a_finite_loss(target: int) -> None:
    hidden, weight = torch.randn(3, 6), torch.randn(10, 6)
    targets = torch.tensor([4, target, 9])
    with pytest.raises(AssertionError, match=rf"targets must lie in 0\.\.9, the vocabulary, got {target}"):
        run_ranks(2, split_vocabulary, hidden, weight, targets)
    for loss, _, _ in run_ranks(2, unchecked, hidden, weight, targets):
        assert loss.isnan()


def test_mixed_and_narrow_dtypes_are_those_of_one_rank() -> None:
    hidden, weight = torch.randn(3, 6).bfloat16(), torch.randn(10, 6)
    targets = torch.tensor([4, 0, 9], dtype=torch.uint8)
    expected = linear_cross_entropy(hidden, weight, targets)
    for loss, grad_hidden, grad_weight in run_ranks(2, split_vocabulary, hidden, weight, targets):
        torch.testing.assert_close(loss, expected)
        assert (grad_hidden.dtype, grad_weight.dtype) == (hidden.dtype, weight.dtype)


def test_a_rank_without_an_entry_is_refused() -> None:
    with pytest.raises(AssertionError, match="a vocabulary of 1 leaves some of 2 ranks without an entry"):
        run_ranks(2, split_vocabulary, torch.randn(3, 6), torch.randn(1, 6), torch.zeros(3, dtype=torch.long))
