"""Linear layers, which can also multiply in float8 where many tokens are read without gradients: prefill and scoring.

Decoding is bound by reading weights and keeps the exact ones, so both forms are held: a byte more for each weight of
such a layer (1.6 GB for the 3B preset). State dicts and saved models have the exact weights alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import nn

from oncelm.ops.float8 import Float8Rows, linear_float8, round_rows

MIN_FLOAT8_TOKENS = 64  # in all rows; fewer are multiplied with the exact weights


class Linear(nn.Linear):
    """x W^T, weight [N, K], without bias; `rounded` is the weight in float8, or None where that is not wanted."""

    rounded: Float8Rows | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    @torch.no_grad()
    def set_float8(self, enabled: bool) -> None:
        """Keep the present weight in float8 too, or no longer. Call it again after changing the weight."""
        self.rounded = round_rows(self.weight) if enabled else None

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        """Another device or dtype."""
        super()._apply(fn, recurse)
        self.set_float8(self.rounded is not None)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rounded is not None and _is_for_float8(x):
            return linear_float8(round_rows(x), self.rounded, x.dtype)
        return F.linear(x, self.weight)


class XavierLinear(Linear):
    """A linear layer that the official code initialises by Xavier's rule with a gain of its own."""

    def __init__(self, in_features: int, out_features: int, gain: float) -> None:
        super().__init__(in_features, out_features)
        self.gain = gain


class Rounded(NamedTuple):
    """x [..., K] in its own dtype, for layers that multiply exactly, and rounded for the others."""

    exact: torch.Tensor
    rows: Float8Rows


def rounded_weight(linear: nn.Module) -> Float8Rows | None:
    """The float8 weight of a layer that has one, where nothing but the product happens."""
    return linear.rounded if isinstance(linear, Linear) and is_plain(linear) else None


def project(x: torch.Tensor | Rounded, *linears: nn.Module) -> list[torch.Tensor]:
    """Several linear layers of one x [..., K]: [..., N] each. In float8, x is rounded once for all of them."""
    weights = [rounded_weight(linear) for linear in linears]
    if isinstance(x, torch.Tensor):
        if all(weight is None for weight in weights) or not _is_for_float8(x):
            return [linear(x) for linear in linears]
        x = Rounded(x, round_rows(x))
    return [
        linear(x.exact) if weight is None else linear_float8(x.rows, weight, x.exact.dtype)
        for linear, weight in zip(linears, weights, strict=True)
    ]


def is_plain(*linears: nn.Module) -> bool:
    """Whether nothing but a product with the weight, row by row in memory, happens in these layers: no adapters, no
    hooks, no weights split over ranks."""
    return all(
        type(linear) in (nn.Linear, Linear, XavierLinear)
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
        and linear.bias is None
        and type(linear.weight) is nn.Parameter
        and linear.weight.is_contiguous()
        for linear in linears
    )


def _is_for_float8(x: torch.Tensor) -> bool:
    return x.numel() >= MIN_FLOAT8_TOKENS * x.shape[-1] and not torch.is_grad_enabled()
