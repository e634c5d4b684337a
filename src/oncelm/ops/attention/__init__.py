"""Softmax attention over positions: a sliding window for the self-decoder, global for the cross-decoder."""

from __future__ import annotations

import torch

from oncelm.ops.dispatch import implementation

__all__ = ["global_attention", "window_attention"]


def window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window_size: int,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention in which a query sees `window_size` keys, itself included.

    Args:
        q: [B, T, H, D], rotated.
        k, v: [B, S, H_kv, D], S >= T; query i stands at key S - T + i, so the first S - T keys are earlier tokens.
        window_size: keys a query sees, itself included.
        scale: factor on q.k; None means D ** -0.5.
        backend: "auto", "sdpa" or "naive".

    Returns:
        [B, T, H, D] in q's dtype.
    """
    _check(q, k, v)
    if window_size < 1:
        raise ValueError(f"window_size must be at least 1 (the token itself), got {window_size}.")
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"window_attention needs a key for every query: {k.shape[1]} keys, {q.shape[1]} queries.")
    return implementation("window_attention", backend, q.device)(q, k, v, window_size, scale)


def global_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    start: int | None = None,
    positions: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Causal attention of any queries over one key/value cache: a query at position p sees keys 0..p.

    Args:
        q: [B, P, H, D], rotated.
        k, v: [B, S, H_kv, D], H a multiple of H_kv; keys of positions 0..S-1.
        start: queries stand at start, start + 1, ...; None means at the end, S - P.
        positions: [B or 1, P] integers, when queries do not stand side by side (then without `start`).
        scale: factor on q.k; None means D ** -0.5.
        backend: "auto", "sdpa" or "naive".

    Returns:
        [B, P, H, D] in q's dtype.
    """
    _check(q, k, v)
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
    return implementation("global_attention", backend, q.device)(q, k, v, start, positions, scale)


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
