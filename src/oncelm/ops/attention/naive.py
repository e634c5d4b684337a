"""The definition of attention with the whole score matrix in float32 or wider. The reference."""

from __future__ import annotations

import torch


def window(q, k, v, window_size, scale):
    T, S = q.shape[1], k.shape[1]
    query = torch.arange(S - T, S, device=q.device)[:, None]
    key = torch.arange(S, device=q.device)
    return _attend(q, k, v, ((key <= query) & (key > query - window_size))[None], scale)


def causal(q, k, v, start, positions, scale):
    if positions is None:
        positions = torch.arange(start, start + q.shape[1], device=q.device)[None]
    key = torch.arange(k.shape[1], device=q.device)
    return _attend(q, k, v, key <= positions[..., None], scale)


def _attend(q, k, v, visible, scale):
    """visible: [B or 1, T, S]."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // k.shape[2]
    k, v = (x.to(dtype).repeat_interleave(groups, dim=2) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bthd,bshd->bhts", q.to(dtype), k) * scale
    weights = scores.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v).to(q.dtype)
