"""Attention through torch's scaled_dot_product_attention, which picks the fastest kernel it has.

Where a mask is needed, queries go in blocks of QUERY_BLOCK, each against just the keys it can see: no score or mask is
ever larger than [QUERY_BLOCK, S], and no work is done on keys that a whole block cannot see.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

QUERY_BLOCK = 256

# cuDNN's attention makes a plan for every length it has not seen, 5 ms each on an H100: a decode step would always wait
ONE_QUERY_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def _sdpa(q, k, v, scale, mask=None, is_causal=False):
    """[B, T, H, D] x [B, S, H_kv, D] -> [B, T, H, D]; mask [..., T, S] of booleans, True where a key is seen."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


def _one_query(q, k, v, scale, mask=None):
    """q [B, 1, H, D]. The heads that share a K/V head become its rows: K and V are read once, not once a head."""
    B, _, H, D = q.shape
    rows = q.reshape(B, k.shape[2], H // k.shape[2], D)  # heads of one group are neighbours
    with sdpa_kernel(ONE_QUERY_BACKENDS) if q.is_cuda else nullcontext():
        out = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
    return out.reshape(B, 1, H, D)


def causal(q, k, v, start, positions, scale):
    P = q.shape[1]
    if P == 0:
        return torch.empty_like(q)
    if positions is not None:
        return _at_positions(q, k, v, positions, scale)
    if P == 1:
        return _one_query(q, k[:, : start + 1], v[:, : start + 1], scale)
    if start == 0:
        return _sdpa(q, k[:, :P], v[:, :P], scale, is_causal=True)
    blocks = []
    for first in range(0, P, QUERY_BLOCK):
        block = q[:, first : first + QUERY_BLOCK]
        seen = start + first + block.shape[1]
        mask = torch.ones(block.shape[1], seen, dtype=torch.bool, device=q.device).tril(start + first)
        blocks.append(_sdpa(block, k[:, :seen], v[:, :seen], scale, mask))
    return torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]


def _at_positions(q, k, v, positions, scale):
    key = torch.arange(k.shape[1], device=q.device)
    blocks = []
    for first in range(0, q.shape[1], QUERY_BLOCK):
        block = q[:, first : first + QUERY_BLOCK]
        mask = (key <= positions[:, first : first + QUERY_BLOCK, None])[:, None]  # [B or 1, 1, block, S]
        attend = _one_query if block.shape[1] == 1 else _sdpa
        blocks.append(attend(block, k, v, scale, mask))
    return torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]


def window(q, k, v, window_size, scale):
    T, S = q.shape[1], k.shape[1]
    if T == 0:
        return torch.empty_like(q)
    if window_size >= S:  # the window never cuts anything off
        return causal(q, k, v, S - T, None, scale)
    blocks = []
    mask = None
    for first in range(0, T, QUERY_BLOCK):
        block = q[:, first : first + QUERY_BLOCK]
        end = S - T + first + block.shape[1]
        begin = max(0, S - T + first - window_size + 1)
        if block.shape[1] == 1:
            blocks.append(_one_query(block, k[:, begin:end], v[:, begin:end], scale))
            continue
        shape = (block.shape[1], end - begin)
        if mask is None or mask.shape != shape or begin == 0:
            offset = S - T + first - begin  # the block's first query among the keys of this slice
            ones = torch.ones(shape, dtype=torch.bool, device=q.device)
            mask = ones.tril(offset).triu(offset - window_size + 1)
        blocks.append(_sdpa(block, k[:, begin:end], v[:, begin:end], scale, mask))
    return torch.cat(blocks, dim=1) if len(blocks) > 1 else blocks[0]
