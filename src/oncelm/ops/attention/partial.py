"""Attention over some of a query's keys, in a form that joins exactly with attention over the others.

Softmax over a set of keys is its output o and the logarithm of its denominator, lse = log sum_s exp(q.k_s). For two
disjoint sets of keys, with w = exp(lse_i - logaddexp(lse_1, lse_2)), the output over both is w_1 o_1 + w_2 o_2: the
"running softmax" of online attention (arXiv 1805.02867, 2205.14135). Keys may live anywhere, and come in blocks.

Scores are float32 or wider, and no more than SCORE_ELEMENTS of them exist at a time. B rows, T queries, S keys, H
heads, H_kv key/value heads, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

SCORE_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 26}  # 64 and 256 MiB in float32


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would turn the float32 products back to bfloat16."""

    @functools.wraps(function)
    def wrapped(q: torch.Tensor, *args: Any, **options: Any) -> Any:
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *args, **options)

    return wrapped


@_without_autocast
def partial_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, start: int | None = None, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q over the keys k; no gradients flow through it.

    Args:
        q: [B, T, H, D].
        k, v: [B, S, H_kv, D], H a multiple of H_kv, S at least 1.
        start: query t sees keys 0..start + t; None means all keys.
        scale: factor on q.k; None means D ** -0.5.

    Returns:
        o [B, T, H, D], normalised over the keys seen, and lse [B, T, H]; both float32 or wider.
    """
    B, T, H, D = q.shape
    H_kv = k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    o = torch.empty(B, T, H, D, dtype=wide, device=q.device)
    lse = torch.empty(B, T, H, dtype=wide, device=q.device)
    keys, values = k.to(wide).permute(0, 2, 3, 1), v.to(wide).transpose(1, 2)
    for block in _query_blocks(B * H * k.shape[1], T, q.device):
        scores = _scores(q[:, block].to(wide), keys, block.start, start, scale)  # [B, H_kv, G * t, S]
        top = scores.amax(-1, keepdim=True)
        denominator = scores.sub_(top).exp_().sum(-1, keepdim=True)
        out = (scores @ values).div_(denominator)
        o[:, block] = out.unflatten(2, (H // H_kv, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
        lse[:, block] = (
            (top + denominator.log()).squeeze(-1).unflatten(2, (H // H_kv, -1)).permute(0, 3, 1, 2).flatten(2)
        )
    return o, lse


@_without_autocast
def partial_attention_backward(
    grad: torch.Tensor,
    delta: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    start: int | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What one set of keys adds to the gradients of attention over several sets.

    Args:
        grad: [B, T, H, D], gradient of the joined output.
        delta: [B, T, H], sum over D of that gradient times the joined output.
        lse: [B, T, H], of the joined attention.
        q, k, v, start, scale: as in `partial_attention`.

    Returns:
        dq [B, T, H, D], dk and dv [B, S, H_kv, D], float32 or wider.
    """
    B, T, H, D = q.shape
    S, H_kv = k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    factor = D**-0.5 if scale is None else scale
    dq = torch.empty(B, T, H, D, dtype=wide, device=q.device)
    dk, dv = (torch.zeros(B, H_kv, S, D, dtype=wide, device=q.device) for _ in "kv")
    keys, values = k.to(wide).transpose(1, 2), v.to(wide).transpose(1, 2)

    def rows(x: torch.Tensor) -> torch.Tensor:
        """[B, t, H, ...] -> [B, H_kv, G * t, ...]"""
        return x.unflatten(2, (H_kv, -1)).movedim(1, 3).flatten(2, 3)

    for block in _query_blocks(2 * B * H * S, T, q.device):
        queries, gradient = q[:, block].to(wide), rows(grad[:, block].to(wide))
        scores = _scores(queries, keys.transpose(2, 3), block.start, start, scale)
        weights = scores.sub_(rows(lse[:, block])[..., None]).exp_()
        dv += weights.transpose(2, 3) @ gradient
        # d loss / d scores = weights * (grad . v - delta)
        d_scores = (gradient @ values.transpose(2, 3)).sub_(rows(delta[:, block])[..., None]).mul_(weights).mul_(factor)
        dq[:, block] = (d_scores @ keys).unflatten(2, (H // H_kv, -1)).movedim(3, 1).flatten(2, 3)
        dk += d_scores.transpose(2, 3) @ rows(queries)
    return dq, dk.transpose(1, 2), dv.transpose(1, 2)


def join_attention(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) over two disjoint sets of keys from the (o, lse) over each."""
    lse = torch.logaddexp(first[1], second[1])
    o = first[0] * (first[1] - lse).exp()[..., None] + second[0] * (second[1] - lse).exp()[..., None]
    return o, lse


def _query_blocks(scores_per_query: int, T: int, device: torch.device) -> Iterator[slice]:
    """Slices of T queries, each small enough for SCORE_ELEMENTS."""
    size = max(1, SCORE_ELEMENTS.get(device.type, SCORE_ELEMENTS["cpu"]) // max(1, scores_per_query))
    for first in range(0, T, size):
        yield slice(first, min(first + size, T))


def _scores(q, keys, first, start, scale):
    """q [B, t, H, D], queries first, first + 1, ...; keys [B, H_kv, D, S] -> [B, H_kv, G * t, S], -inf where unseen."""
    _, t, H, D = q.shape
    H_kv, S = keys.shape[1], keys.shape[3]
    rows = (q * (D**-0.5 if scale is None else scale)).unflatten(2, (H_kv, -1)).permute(0, 2, 3, 1, 4)
    scores = rows.flatten(2, 3) @ keys
    if start is not None and start + first + 1 < S:
        query = torch.arange(start + first, start + first + t, device=q.device)[:, None]
        unseen = torch.arange(S, device=q.device) > query  # [t, S]
        scores = scores.unflatten(2, (H // H_kv, t)).masked_fill_(unseen, -torch.inf).flatten(2, 3)
    return scores
