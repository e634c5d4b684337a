"""Linear layers that can also multiply in float8 where many tokens are read without gradients: prefill and scoring.

They are `torch.nn.Linear` layers, so tools that replace or wrap those (4-bit layers, adapters) work here too. Decoding
is bound by reading weights and uses the exact ones, so both are in memory: a byte more for each weight of
such a layer (1.6 GB for the 3B preset). State dicts and saved models have the exact weights alone.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from oncelm.models.plain import is_plain_linear
from oncelm.ops.float8 import Float8Rows, linear_float8, round_rows

MIN_FLOAT8_TOKENS = 64  # in all rows; fewer are multiplied with the exact weights


def linear(in_features: int, out_features: int, xavier_gain: float | None = None) -> nn.Linear:
    """A layer without bias. xavier_gain: the official code initialises it by Xavier's rule with this gain."""
    layer: Any = nn.Linear(in_features, out_features, bias=False)
    layer.xavier_gain = xavier_gain
    layer.rounded = None
    return layer


@torch.no_grad()
def set_float8(layer: Any, enabled: bool) -> None:
    """Keep the present weight in float8 too, or no longer. Call it again after changing the weight."""
    layer.rounded = round_rows(layer.weight) if enabled else None


class Rounded(NamedTuple):
    """x [..., K] in its own dtype, for layers that multiply exactly, and rounded for the others."""

    exact: torch.Tensor
    rows: Float8Rows


def rounded_weight(layer: nn.Module) -> Float8Rows | None:
    """The float8 weight of a layer that has one, where nothing but the product happens."""
    rounded = getattr(layer, "rounded", None)
    return rounded if rounded is not None and is_plain_linear(layer) else None


def project(x: torch.Tensor | Rounded, *layers: nn.Module) -> list[torch.Tensor]:
    """Several linear layers of one x [..., K]: [..., N] each. In float8, x is rounded once for all of them."""
    weights = [rounded_weight(layer) for layer in layers]
    if isinstance(x, torch.Tensor):
        if all(weight is None for weight in weights) or not _is_for_float8(x):
            return [layer(x) for layer in layers]
        x = Rounded(x, round_rows(x))
    return [
        layer(x.exact) if weight is None else linear_float8(x.rows, weight, x.exact.dtype)
        for layer, weight in zip(layers, weights, strict=True)
    ]


def _is_for_float8(x: torch.Tensor) -> bool:
    return x.numel() >= MIN_FLOAT8_TOKENS * x.shape[-1] and not torch.is_grad_enabled()
