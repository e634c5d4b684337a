"""The token-wise parts of a layer for a few tokens on a GPU: one kernel before tokens meet, three after.

`FUSED` computes what PLAIN computes (model.py), to rounding, with the kernels of `ops.decode_linear`. They read the
weights of plain linear layers; a layer with anything else (adapters, hooks), and a mixer that does not say what its
projections are (`Mixer.projections`), is computed by PLAIN.
"""

from __future__ import annotations

import torch
from torch import nn

from oncelm.models.plain import is_plain_linear, is_plain_norm, is_untouched
from oncelm.models.rms_norm import RMSNorm
from oncelm.models.yoco.model import (
    PLAIN,
    CrossDecoder,
    DecoderLayer,
    Tensors,
    TokenParts,
)
from oncelm.ops.decode_linear import LARGEST_HEAD, linear_add, norm_linears, norm_swiglu

__all__ = ["FUSED"]


def before(layer: DecoderLayer, x: torch.Tensor, rotation: torch.Tensor) -> tuple[Tensors, torch.Tensor | None]:
    """As DecoderLayer.before."""
    mixer = layer.mixer
    if mixer.projections is None or not is_plain_norm(layer.mixer_layer_norm):
        return PLAIN.before(layer, x, rotation)
    projections = [getattr(mixer, name) for name in mixer.projections]
    if not is_plain_linear(*projections):
        return PLAIN.before(layer, x, rotation)
    outputs = norm_linears(
        x.flatten(0, 1),
        layer.mixer_layer_norm.weight,
        layer.mixer_layer_norm.eps,
        [projection.weight for projection in projections],
        list(mixer.projections.values()),
        rotation=_rows(rotation, x),
        pairing=mixer.pairing,
        decay_scale=mixer.decay_scale,
    )
    return mixer.arrange(*(y.unflatten(0, x.shape[:2]) for y in outputs))


def after(layer: DecoderLayer, x: torch.Tensor, o: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
    """As DecoderLayer.after."""
    mixer, ffn, norm = layer.mixer, layer.ffn, layer.final_layer_norm
    if not is_plain_norm(norm) or not is_untouched(ffn) or not is_plain_linear(ffn.fc1, ffn.gate, ffn.fc2):
        return PLAIN.after(layer, x, o, gate)
    known = mixer.projections is not None and (gate is None or _fits(mixer.head_dim))
    if not known or not is_plain_linear(mixer.out_proj):
        y = (x + mixer.after(o, gate)).flatten(0, 1)
    else:
        rows, mixed = x.flatten(0, 1), o.flatten(2).flatten(0, 1)
        if gate is None:
            y = linear_add(mixed, mixer.out_proj.weight, rows)
        else:
            gates = gate.flatten(0, 1)
            y = linear_add(mixed, mixer.out_proj.weight, rows, gate=gates, head_dim=mixer.head_dim, eps=mixer.eps)
    h = norm_swiglu(y, norm.weight, norm.eps, ffn.fc1.weight, ffn.gate.weight)
    return linear_add(h, ffn.fc2.weight, y).view_as(x)


def keys_and_values(cross: CrossDecoder, y: torch.Tensor, rotation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As CrossDecoder.keys_and_values."""
    if not is_plain_norm(cross.kv_layer_norm) or not is_plain_linear(cross.k_proj, cross.v_proj):
        return PLAIN.keys_and_values(cross, y, rotation)
    k, v = norm_linears(
        y.flatten(0, 1),
        cross.kv_layer_norm.weight,
        cross.kv_layer_norm.eps,
        [cross.k_proj.weight, cross.v_proj.weight],
        ["rope", "plain"],
        rotation=_rows(rotation, y),
        pairing=cross.pairing,
    )
    shape = (*y.shape[:2], -1, cross.head_dim)
    return k.view(shape), v.view(shape)


def head(x: torch.Tensor, norm: RMSNorm, projection: nn.Linear) -> torch.Tensor:
    """As PLAIN.head."""
    if not is_plain_norm(norm) or not is_plain_linear(projection):
        return PLAIN.head(x, norm, projection)
    (logits,) = norm_linears(x.flatten(0, 1), norm.weight, norm.eps, [projection.weight], ["plain"])
    return logits.unflatten(0, x.shape[:2])


def _fits(head_dim: int) -> bool:
    """Whether the kernel behind a gate takes heads of this size: powers of two."""
    return head_dim <= LARGEST_HEAD and head_dim & (head_dim - 1) == 0


def _rows(rotation: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """rotation [B or 1, T, D/2, 2] for each row of x [B, T, d]: [B T, D/2, 2]."""
    return rotation.expand(x.shape[0], -1, -1, -1).flatten(0, 1).contiguous()


FUSED = TokenParts(before, after, keys_and_values, head)
