"""A matrix product added to a tensor in its place."""

from __future__ import annotations

import torch


# torch.addmm does not do: its result is a tensor of its own, into which y is copied first. Nor does y.addmm_ under
# torch.compile, which makes a torch.addmm of it; a custom op's mutation it keeps
@torch.library.custom_op("oncelm::add_product_", mutates_args=("y",))
def add_product_(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """y [..., N] += x [..., K] weight^T, weight [N, K], all of one dtype. Where y is contiguous, rounded once."""
    if y.is_contiguous():
        y.view(-1, y.shape[-1]).addmm_(x.flatten(0, -2), weight.t())
    else:
        y += x @ weight.t()


@add_product_.register_fake
def _(y, x, weight):
    return None
