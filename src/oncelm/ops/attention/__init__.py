"""Softmax attention over positions: a sliding window for the self-decoder, global for the cross-decoder.

Global attention has two forms: any queries over keys whose number the host knows, and the last few tokens of sequences
whose lengths only the device knows (decoding, in a CUDA graph too).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from oncelm.ops.attention import decode
from oncelm.ops.attention.packed import Borders, by_sequence
from oncelm.ops.dispatch import choose, implementation
from oncelm.ops.dtypes import one_dtype
from oncelm.ops.layout import aligned
from oncelm.ops.quantize import LARGEST

__all__ = ["decode_attention", "global_attention", "window_attention"]

MOST_DECODED = 16  # tokens of a sequence in one decode step
PAGE_SIZES = (256, 128, 64, 32, 16)  # tokens of a block that decode_attention takes


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window_size: int,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention in which a query sees `window_size` keys, itself included.

    Args:
        q: [B, T, H, D], rotated.
        k, v: [B, S, H_kv, D], S >= T; query i stands at key S - T + i, so the first S - T keys are earlier tokens.
        window_size: keys a query sees, itself included.
        scale: factor on q.k; None means D ** -0.5.
        cu_seqlens: [N + 1] int, borders of N sequences packed along T, each from its first token (then B is 1, S is T);
            empty ones are allowed. On a GPU only its shape is checked: reading the values would wait for the device.
        max_seqlen: tokens of the longest packed sequence, or more; None looks, which waits for the device.
        backend: "auto", "cudnn", "varlen", "sdpa" or "naive".

    Returns:
        [B, T, H, D] in q's dtype.
    """
    _check(q, k, v)
    if window_size < 1:
        raise ValueError(f"window_size must be at least 1 (the token itself), got {window_size}.")
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"window_attention needs a key for every query: {k.shape[1]} keys, {q.shape[1]} queries.")
    borders = None if cu_seqlens is None else Borders.packed(q, k, cu_seqlens, None, max_seqlen)
    return _run("window_attention", backend, q, k, v, borders, lambda S, T: (window_size, scale))


def global_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    start: int | None = None,
    positions: torch.Tensor | None = None,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention of any queries over one key/value cache: a query at position p sees keys 0..p.

    Args:
        q: [B, P, H, D], rotated.
        k, v: [B, S, H_kv, D], H a multiple of H_kv; keys of positions 0..S-1.
        start: queries stand at start, start + 1, ...; None means at the end, S - P.
        positions: [B or 1, P] integers, when queries do not stand side by side (then without `start`).
        scale: factor on q.k; None means D ** -0.5.
        cu_seqlens: [N + 1] int, borders of N sequences' queries packed along P (then B is 1, and neither start nor
            positions is given); a sequence's queries stand at the end of its keys; empty ones are allowed.
        cu_seqlens_k: [N + 1] int, borders of their keys, at least as many as queries; None means the same.
        max_seqlen: keys of the longest packed sequence, or more; None looks, which waits for the device.
        backend: "auto", "varlen", "sdpa" or "naive".

    Returns:
        [B, P, H, D] in q's dtype.
    """
    _check(q, k, v)
    if cu_seqlens is not None:
        if start is not None or positions is not None:
            raise ValueError("give start or positions, or cu_seqlens, to global_attention, not both.")
        borders = Borders.packed(q, k, cu_seqlens, cu_seqlens_k, max_seqlen)
        return _run("global_attention", backend, q, k, v, borders, lambda S, P: (S - P, None, scale))
    if positions is not None:
        if start is not None:
            raise ValueError("give start or positions to global_attention, not both.")
        if positions.dim() != 2 or positions.shape[1] != q.shape[1] or positions.shape[0] not in (1, q.shape[0]):
            raise ValueError(f"positions must be [B or 1, P] = {list(q.shape[:2])}, got {list(positions.shape)}.")
    else:
        start = k.shape[1] - q.shape[1] if start is None else start
        if start < 0 or start + q.shape[1] > k.shape[1]:
            raise ValueError(
                f"queries at {start}..{start + q.shape[1] - 1} lie outside the {k.shape[1]} keys of global_attention."
            )
    return _run("global_attention", backend, q, k, v, None, lambda S, P: (start, positions, scale))


def _run(
    op: str,
    backend: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    borders: Borders | None,
    rest: Callable[[int, int], tuple],
) -> torch.Tensor:
    """The op with its `rest(S, T)` of arguments: all packed sequences in one call, where the implementation can."""
    chosen = choose(op, backend, q.device)
    compute = chosen.load()
    dtype = q.dtype
    q, k, v = one_dtype(q, k, v)
    if q.is_cuda:
        q, k, v = aligned(q), aligned(k), aligned(v)
    if borders is None or chosen.packed:
        packed = () if borders is None else (borders,)
        o = compute(q, k, v, *rest(k.shape[1], q.shape[1]), *packed)
    else:
        o = by_sequence(lambda q, k, v: compute(q, k, v, *rest(k.shape[1], q.shape[1])), q, k, v, borders)
    return o if q.dtype == dtype else o.to(dtype)  # as it is under autocast


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    lengths: torch.Tensor,
    block_tables: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention of the last T tokens of each sequence over its cache; no gradients.

    Nothing depends on the values of `lengths` before the device reads them: no wait, and a CUDA graph can hold it. What
    lies behind a sequence's length is not read.

    Args:
        q: [N, T, H, D], T = 1..16 (several: speculative drafts), rotated. Query t sees keys 0 .. length - T + t; one
            that sees none (a length of 0: an idle slot) gets zeros.
        k, v: [N, S, H_kv, D], H a multiple of H_kv; or with block_tables [num_blocks, block_size, H_kv, D], block_size
            a power of two of 16..256. Of q's dtype, or float8_e4m3fn or int8 with scales (`quantize_kv`).
        lengths: [N] int32 or int64, tokens that each sequence has in the cache, the T new ones included.
        block_tables: [N, max_blocks] int32 or int64: which blocks hold a sequence's tokens, in order.
        k_scale, v_scale: float32 of the shape of k without D.
        scale: factor on q.k; None means D ** -0.5.
        backend: "auto", "triton", "sdpa" or "naive".

    Returns:
        [N, T, H, D] in q's dtype.

    Source: the split over keys is that of Flash-Decoding (Dao, Haziza, Massa, Sizov, 2023), cut on the device.
    """
    _check_decode(q, k, v, lengths, block_tables, k_scale, v_scale)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    attend = implementation("decode_attention", backend, q.device)
    return attend(q, k, v, lengths, block_tables, k_scale, v_scale, scale)


def masked_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sees: torch.Tensor) -> torch.Tensor:
    """Attention of a few queries to the keys that a mask names; a CUDA graph can hold it.

    Args:
        q: [N, T, H, D]. k, v: [N, S, H_kv, D], H a multiple of H_kv. sees: [N, T, S], True where a query sees a key;
            each sees one.

    Returns:
        [N, T, H, D].
    """
    _check(q, k, v)
    N, T, H, _ = q.shape
    group = H // k.shape[2]
    # the heads that share a K/V head are rows of one product, so that no key is repeated
    rows = q.unflatten(2, (-1, group)).transpose(1, 2).flatten(2, 3)  # [N, H_kv, T * group, D]
    mask = sees[:, None, :, None].expand(N, 1, T, group, -1).flatten(2, 3)
    o = F.scaled_dot_product_attention(rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
    return o.unflatten(2, (T, group)).transpose(1, 2).flatten(2, 3)


def has_decode_kernel(q: torch.Tensor, k: torch.Tensor, tokens: int | None = None) -> bool:
    """Whether `decode_attention` runs a kernel on these, not a PyTorch form that passes over all the room in k.

    tokens: of a sequence, where q packs them; None: q is [N, T, H, D].
    """
    return choose("decode_attention", "auto", q.device).backend == "triton" and decode.fits_kernel(q, k, tokens)


def _check_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: torch.Tensor,
    block_tables: torch.Tensor | None,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
) -> None:
    if block_tables is None:
        _check(q, k, v)
    else:
        _check(q, k[:1].expand(q.shape[0], -1, -1, -1), v[:1].expand(q.shape[0], -1, -1, -1))
        if k.shape[0] != v.shape[0]:
            raise ValueError(f"k and v of decode_attention have {k.shape[0]} and {v.shape[0]} blocks.")
        if k.shape[1] not in PAGE_SIZES:
            raise ValueError(f"block_size of decode_attention must be 16, 32, 64, 128 or 256, got {k.shape[1]}.")
        if block_tables.dim() != 2 or block_tables.shape[0] != q.shape[0] or block_tables.is_floating_point():
            raise ValueError(
                f"block_tables must be [{q.shape[0]}, max_blocks] integers, got {block_tables.dtype} "
                f"{list(block_tables.shape)}."
            )
    if not 1 <= q.shape[1] <= MOST_DECODED:
        raise ValueError(
            f"decode_attention takes the last 1..{MOST_DECODED} tokens of a sequence, got {q.shape[1]}; "
            "global_attention takes any number."
        )
    if lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"lengths must be [{q.shape[0]}] int32 or int64, got {lengths.dtype} {list(lengths.shape)}.")
    if k.dtype != v.dtype or (k.dtype not in LARGEST and k.dtype != q.dtype):
        raise ValueError(
            f"k and v must both be of q's dtype {q.dtype}, or of {' or '.join(map(str, LARGEST))}; "
            f"got {k.dtype} and {v.dtype}."
        )
    for name, x, scales in (("k_scale", k, k_scale), ("v_scale", v, v_scale)):
        if (scales is not None) != (k.dtype in LARGEST):
            raise ValueError(f"{name} goes with quantised keys and values, and these are {k.dtype}.")
        if scales is not None and (scales.shape != x.shape[:3] or scales.dtype != torch.float32):
            raise ValueError(f"{name} must be float32 {list(x.shape[:3])}, got {scales.dtype} {list(scales.shape)}.")


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape:
        raise ValueError(
            "q must be [B, T, H, D] and k, v both [B, S, H_kv, D], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head dimension.")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} key/value heads.")
