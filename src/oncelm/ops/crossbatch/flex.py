"""Crossbatch attention as one FlexAttention call: rows side by side, and a block mask that says who sees whom.

Keys appear twice, at their own positions and at position 0, and are not gathered: the mask picks.
"""

from __future__ import annotations

from functools import cache, lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from oncelm.ops.attention.varlen import autocast

BLOCK = 128  # tokens: FlexAttention leaves out, or takes without asking, squares of this size


def packed(q, k, first_k, v, counts, scale):
    q, k, first_k, v = autocast(q, k, first_k, v)
    B, T, H = q.shape[:3]

    def heads(*parts):
        return torch.cat([part.flatten(0, 1) for part in parts]).transpose(0, 1)[None]  # [1, H, rows * T, D]

    attend = _compiled() if q.is_cuda else flex_attention
    out = attend(
        heads(q),
        heads(k, first_k),
        heads(v, v),
        block_mask=_mask(counts, T, q.device),
        scale=scale,
        enable_gqa=k.shape[2] != H,
    )
    return out[0].transpose(0, 1).unflatten(0, (B, T))


@cache
def _compiled():
    return torch.compile(flex_attention)


@lru_cache(maxsize=8)
def _mask(counts, T, device):
    seen, tokens = torch.tensor(counts, device=device), len(counts) * T

    def visible(b, h, query, key):
        at_zero = key >= tokens
        place = torch.where(at_zero, key - tokens, key)
        distance = query // T - place // T
        own = ~at_zero & (distance == 0) & (place <= query)
        return own | (at_zero & (distance > 0) & (distance <= seen[query // T]))

    if T % BLOCK:
        return create_block_mask(visible, None, None, tokens, 2 * tokens, device=device)
    # that asks every pair of tokens, for 94 GB at 32 rows of 2,048; here a block belongs to one row
    block = torch.arange(tokens // BLOCK, device=device)
    row = block // (T // BLOCK)
    distance, earlier = row[:, None] - row, block[:, None] > block
    whole = torch.cat(((distance == 0) & earlier, (distance > 0) & (distance <= seen[row, None])), dim=1)
    partly = torch.cat((block[:, None] == block, torch.zeros_like(earlier)), dim=1)
    return BlockMask.from_kv_blocks(
        *_numbers(partly), *_numbers(whole), BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(tokens, 2 * tokens)
    )


def _numbers(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """bool [Q, K] -> how many of a row's are true [1, 1, Q], and their numbers before the others' [1, 1, Q, K]."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1, dtype=torch.int32)[None, None], order.int()[None, None]
