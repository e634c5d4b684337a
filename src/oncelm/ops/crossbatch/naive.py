"""The definition of crossbatch attention: one softmax over the gathered keys of all contexts. The reference."""

from __future__ import annotations

import torch


def gathered(q, k, first_k, v, counts, scale):
    _, T, H, D = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    k, first_k, v = (x.to(wide).repeat_interleave(H // k.shape[2], dim=2) for x in (k, first_k, v))
    scale = D**-0.5 if scale is None else scale
    causal = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    rows = []
    for b, count in enumerate(counts):
        keys = torch.cat((k[b], *(first_k[b - c] for c in range(1, count + 1))))  # [(1 + count) * T, H, D]
        values = torch.cat((v[b], *(v[b - c] for c in range(1, count + 1))))
        scores = torch.einsum("thd,shd->hts", q[b].to(wide), keys) * scale
        seen = torch.cat((causal, causal.new_ones(T, count * T)), dim=1)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        rows.append(torch.einsum("hts,shd->thd", weights, values))
    return torch.stack(rows).to(q.dtype)
