"""Decode attention in PyTorch: the definition, and the form for devices without a kernel.

Both take keys and values as `decode_attention` does: paged or not, quantised or not, and with anything at all, NaN
too, in the rows behind a sequence's length.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from oncelm.ops.quantize import as_bytes, dequantize_kv

Tensor = torch.Tensor

# what decode_triton.py has kernels for; the rest runs here
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNEL_DIMS = (16, 32, 64, 128, 256)
KERNEL_ROWS = 128  # queries of a sequence that share a head: more do not fit the registers


def fits_kernel(q: Tensor, k: Tensor, tokens: int | None = None) -> bool:
    """Whether a kernel takes q [N, T, H, D] over k [..., H_kv, D]; `tokens`: T, where q packs sequences."""
    rows = (tokens or q.shape[1]) * q.shape[2] // k.shape[2]
    return q.dtype in KERNEL_DTYPES and q.shape[3] in KERNEL_DIMS and rows <= KERNEL_ROWS


def naive(q, k, v, lengths, block_tables, k_scale, v_scale, scale):
    """The whole score matrix in float32 or wider. The reference."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    groups = q.shape[2] // k.shape[2]
    seen = _seen(lengths, q.shape[1], _capacity(k, block_tables))
    heads = slice(None)
    k = _rows(k, k_scale, block_tables, heads, seen, dtype).repeat_interleave(groups, dim=2)
    v = _rows(v, v_scale, block_tables, heads, seen, dtype).repeat_interleave(groups, dim=2)
    scores = torch.einsum("nthd,nshd->nhts", q.to(dtype), k) * scale
    weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0.0)  # NaN: sees no key at all
    return torch.einsum("nhts,nshd->nthd", weights, v).to(q.dtype)


def sdpa(q, k, v, lengths, block_tables, k_scale, v_scale, scale):
    """One key/value head after the other, so that no more than a head is ever copied or dequantised."""
    N, T, H, D = q.shape
    H_kv = k.shape[2]
    group = H // H_kv
    capacity = _capacity(k, block_tables)
    if q.device.type == "cpu" and N:  # elsewhere the host would have to wait for the lengths
        capacity = min(capacity, max(int(lengths.max()), 1))
    seen = _seen(lengths, T, capacity)
    queries = q.view(N, T, H_kv, group, D).transpose(1, 2)  # [N, H_kv, T, group, D]
    mask = seen[:, None, :, None].expand(N, 1, T, group, capacity).flatten(2, 3)
    outputs = []
    for head in range(H_kv):
        heads = slice(head, head + 1)
        keys, values = (
            _rows(x, scales, block_tables, heads, seen, q.dtype).transpose(1, 2)
            for x, scales in ((k, k_scale), (v, v_scale))
        )
        rows = queries[:, heads].flatten(2, 3)  # the queries that share the head: [N, 1, T * group, D]
        outputs.append(F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale))
    o = torch.cat(outputs, 1).view(N, H_kv, T, group, D).transpose(1, 2).reshape(q.shape)
    return o.masked_fill(~seen.any(-1)[:, :, None, None], 0.0)


def _capacity(k: Tensor, block_tables: Tensor | None) -> int:
    """Tokens that a sequence can have."""
    return k.shape[1] if block_tables is None else k.shape[1] * block_tables.shape[1]


def _seen(lengths: Tensor, T: int, capacity: int) -> Tensor:
    """[N, T, capacity]: whether query t, of the last T tokens, sees a key."""
    last = lengths[:, None] - T + torch.arange(T, device=lengths.device)
    return torch.arange(capacity, device=lengths.device) <= last[..., None]


def _rows(
    x: Tensor, scales: Tensor | None, block_tables: Tensor | None, heads: slice, seen: Tensor, dtype: torch.dtype
) -> Tensor:
    """Keys or values [N, capacity, heads, D] in `dtype`, zero where no query sees them."""

    def gathered(x: Tensor) -> Tensor:
        capacity = seen.shape[2]
        if block_tables is None:
            return x[:, :capacity, heads]
        pages = block_tables[:, : -(-capacity // x.shape[1])].clamp(0, x.shape[0] - 1).long()
        return as_bytes(x[:, :, heads])[pages].view(x.dtype).flatten(1, 2)[:, :capacity]

    rows = gathered(x)
    rows = rows.to(dtype) if scales is None else dequantize_kv(rows, gathered(scales), dtype)
    return rows.masked_fill(~seen.any(1)[..., None, None], 0.0)
