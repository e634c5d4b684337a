"""The token-wise parts of a layer in float8, on a GPU: one kernel does all that is between two matrix products, and
rounds the result for the second.

`FLOAT8` computes what PLAIN computes with rounded weights (linear.py), to float8's rounding. A layer without rounded
weights, as those of the cross-decoder, is computed by PLAIN.
"""

from __future__ import annotations

import torch
from torch import nn

from oncelm.models.plain import is_plain_norm, is_untouched
from oncelm.models.yoco.linear import Rounded, rounded_weight
from oncelm.models.yoco.model import PLAIN, DecoderLayer, Tensors, TokenParts
from oncelm.ops.float8 import Float8Rows, linear_float8, round_rows
from oncelm.ops.float8_triton import add_norm_rows, gate_heads_rows, norm_rows, swiglu_rows

__all__ = ["FLOAT8"]


def before(layer: DecoderLayer, x: torch.Tensor, rotation: torch.Tensor) -> tuple[Tensors, torch.Tensor | None]:
    """As DecoderLayer.before."""
    norm = layer.mixer_layer_norm
    if not is_rounded(layer) or not is_plain_norm(norm):
        return PLAIN.before(layer, x, rotation)
    return layer.mixer.before(Rounded(*norm_rows(x, norm.weight, norm.eps)), rotation)


def after(layer: DecoderLayer, x: torch.Tensor, o: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """As DecoderLayer.after."""
    mixer, ffn, norm = layer.mixer, layer.ffn, layer.final_layer_norm
    if not is_rounded(layer) or not is_plain_norm(norm) or not is_untouched(ffn):
        return PLAIN.after(layer, x, o, gate)

    def times(rows: Float8Rows, linear: nn.Module) -> torch.Tensor:
        weight = rounded_weight(linear)
        assert weight is not None
        return linear_float8(rows, weight, x.dtype)

    mixed = round_rows(o.flatten(2)) if gate is None else gate_heads_rows(o, gate, mixer.eps)
    x, h = add_norm_rows(x, times(mixed, mixer.out_proj), norm.weight, norm.eps)
    return x + times(swiglu_rows(times(h, ffn.fc1), times(h, ffn.gate)), ffn.fc2)


def is_rounded(layer: DecoderLayer) -> bool:
    """Whether all products in `after` are in float8: in the self-decoder where the mixer offers that, unless an adapter
    took a layer's place."""
    mixer, ffn = layer.mixer, layer.ffn
    if "out_proj" not in mixer.float8_layers:
        return False
    return all(rounded_weight(linear) is not None for linear in (mixer.out_proj, ffn.fc1, ffn.gate, ffn.fc2))


FLOAT8 = TokenParts(before, after, PLAIN.keys_and_values, PLAIN.head)
