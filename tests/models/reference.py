"""What a model answers to whole sequences at once, and how far rounding alone moves each token's answer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# A token's error is a number drawn by rounding: one run of another order may draw this much more than the largest of
# four. Where nothing is ill-conditioned, that is about 1e-5.
FACTOR = 8


@dataclass(frozen=True)
class Reference:
    """Logits [..., vocabulary] in float64, and the error [...] of the plain float32 forward pass at each token."""

    exact: Tensor
    error: Tensor

    def __getitem__(self, where: Any) -> Reference:
        return Reference(self.exact[where], self.error[where])

    def check(self, found: Tensor) -> None:
        """Raise AssertionError where `found` is much further from float64 than the plain forward pass is."""
        assert found.shape == self.exact.shape
        rounding = 4 * torch.finfo(found.dtype).eps * self.exact.abs().amax(-1)
        limit = FACTOR * self.error + rounding
        off = _largest(found.detach() - self.exact)
        assert (off <= limit).all(), f"off by {off[off > limit].tolist()}, plain by {self.error[off > limit].tolist()}"


@torch.no_grad()
def whole(model: nn.Module, ids: Tensor) -> Reference:
    """The full forward pass over ids [B, T]: the error is the largest of `model` and of three within rounding of it."""
    exact, *near = _copies(model)
    logits = exact(ids, use_cache=False).logits
    errors = [_largest(plain(ids, use_cache=False).logits - logits) for plain in (model, *near)]
    return Reference(logits, torch.stack(errors).amax(0))


def whole_rows(model: nn.Module, rows: Sequence[Tensor]) -> list[Reference]:
    """Of each row of ids [T_i], in one pass: what stands behind a row, to fill the batch, no token of it sees."""
    reference = whole(model, torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True))
    return [reference[i, : len(row)] for i, row in enumerate(rows)]


@cache
def _copies(model: nn.Module) -> list[nn.Module]:
    """The model in float64, and three whose weights are off by a unit in the last place."""
    copies = [copy.deepcopy(model) for _ in range(4)]
    generator = torch.Generator().manual_seed(0)
    for near in copies[1:]:
        for weight in near.parameters():
            moved = torch.randint(-1, 2, weight.shape, generator=generator)
            weight.data *= 1 + moved * torch.finfo(weight.dtype).eps
    return [copies[0].double(), *copies[1:]]


def _largest(difference: Tensor) -> Tensor:
    """[..., vocabulary] -> [...]; NaN, which `<=` refuses, stays."""
    return difference.abs().amax(-1)
