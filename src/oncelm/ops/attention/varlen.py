"""Attention on a GPU through torch's FlashAttention for packed sequences, which also knows windows and grouped heads.

One call serves all sequences of a batch; no mask is ever made. It computes in 16 bits with heads of up to 256: what
does not fit (float32, one query a sequence) goes through sdpa.py, each sequence on its own.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn

from oncelm.ops.attention import sdpa
from oncelm.ops.attention.packed import Borders, by_sequence

ASKS_FOR_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 takes grouped heads unasked


def window(q, k, v, window_size, scale, borders=None):
    """q [B, T, H, D]; k, v [B, S, H_kv, D]."""
    if borders is None and window_size >= k.shape[1]:
        return causal(q, k, v, k.shape[1] - q.shape[1], None, scale)
    q, k, v = autocast(q, k, v)
    if not fits(q, k):
        return _portable(lambda q, k, v: sdpa.window(q, k, v, window_size, scale), q, k, v, borders)
    return _attend(q, k, v, window_size - 1, scale, borders)


def causal(q, k, v, start, positions, scale, borders=None):
    """q [B, P, H, D]; k, v [B, S, H_kv, D]. The plain causal square is SDPA's: on Hopper cuDNN computes it faster."""
    q, k, v = autocast(q, k, v)
    if borders is None:
        if positions is not None or start == 0 or not fits(q, k):
            return sdpa.causal(q, k, v, start, positions, scale)
        k, v = (x[:, : start + q.shape[1]] for x in (k, v))
    elif not fits(q, k):
        return _portable(lambda q, k, v: sdpa.causal(q, k, v, k.shape[1] - q.shape[1], None, scale), q, k, v, borders)
    return _attend(q, k, v, -1, scale, borders)


def _portable(compute, q, k, v, borders):
    return compute(q, k, v) if borders is None else by_sequence(compute, q, k, v, borders)


def autocast(*tensors):
    """In the autocast dtype, as SDPA would do by itself."""
    if not torch.is_autocast_enabled("cuda"):
        return tensors
    return tuple(x.to(torch.get_autocast_dtype("cuda")) for x in tensors)


def fits(q, k):
    """Whether torch's FlashAttention takes them."""
    if q.dtype != k.dtype or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[1] <= 1:
        return False
    return q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and _has_flash(q.device.index)


@torch.compiler.assume_constant_result
def _has_flash(index: int) -> bool:
    """From Ampere on."""
    return torch.cuda.get_device_capability(index) >= (8, 0)


def _attend(q, k, v, left, scale, borders):
    """Queries stand at the end of their keys and see themselves and `left` keys before (-1: all)."""
    B, T = q.shape[:2]
    if borders is None:
        borders = Borders.dense(B, T, k.shape[1], q.device)
    rest: dict[str, Any] = {"enable_gqa": True} if ASKS_FOR_GQA and q.shape[2] != k.shape[2] else {}
    out: Any = varlen_attn(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        borders.queries,
        borders.keys,
        borders.max_queries,
        borders.max_keys,
        scale=scale,
        window_size=(left, 0),
        **rest,
    )
    return out.unflatten(0, (B, T))
