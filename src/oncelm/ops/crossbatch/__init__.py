"""Crossbatch attention: the training form of memory layers (Focused Transformer, arXiv 2307.03170, section 3.2).

Each row of a batch is one context. In a memory layer its queries see their own context causally and, whole, the
contexts of some rows before it, whose keys stand at local position 0. With `dataset_packing` rows a document, some of
those are earlier parts of the same document (positives) and the others parts of another one (negatives).
"""

from __future__ import annotations

import torch

from oncelm.ops.dispatch import implementation
from oncelm.ops.dtypes import one_dtype
from oncelm.ops.rope import apply_rope, rope_frequencies, rope_rotation
from oncelm.utils.errors import check_whole

__all__ = ["attend_contexts", "crossbatch_attention", "earlier_contexts"]


def crossbatch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    cross_batch_range: int,
    cross_batch_stepping: bool,
    dataset_packing: int,
    rope_theta: float | None,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention of each row over itself (causal) and over the rows before it (all keys, as at position 0).

    Args:
        q: [B, T, H, D], before RoPE; row b is one context of T tokens.
        k, v: [B, T, H_kv, D], before RoPE, H a multiple of H_kv.
        cross_batch_range, cross_batch_stepping, dataset_packing: see `earlier_contexts`.
        rope_theta: base of LLaMA's rotary embedding (pairs j, j + D/2); None for none.
        scale: factor on q.k; None means D ** -0.5.
        backend: "auto", "flex", "flash", "blocks" or "naive".

    Returns:
        [B, T, H, D] in q's dtype. Gradients reach the queries, keys and values of every row.
    """
    counts = earlier_contexts(q.shape[0], cross_batch_range, cross_batch_stepping, dataset_packing)
    first = k
    if rope_theta is not None:
        frequencies = rope_frequencies(q.shape[-1], rope_theta, "standard", q.device)
        rotation = rope_rotation(torch.arange(q.shape[1], device=q.device)[None], frequencies)
        q, k = apply_rope(q, rotation, "half"), apply_rope(k, rotation, "half")
    return attend_contexts(q, k, first, v, counts, scale=scale, backend=backend)


def attend_contexts(
    q: torch.Tensor,
    k: torch.Tensor,
    first_k: torch.Tensor,
    v: torch.Tensor,
    counts: tuple[int, ...],
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """The same for keys that are rotated already: k at their own positions, first_k [B, T, H_kv, D] at position 0.

    counts: rows before each row that it sees.
    """
    if q.dim() != 4 or k.dim() != 4 or not k.shape == first_k.shape == v.shape or q.shape[:2] != k.shape[:2]:
        raise ValueError(
            "q must be [B, T, H, D] and k, v both [B, T, H_kv, D] of the same B and T, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}."
        )
    if q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"the heads of q {tuple(q.shape)} and k {tuple(k.shape)} do not fit each other.")
    attend = implementation("crossbatch_attention", backend, q.device)
    o = attend(*one_dtype(q, k, first_k, v), counts, scale)
    return o if torch.is_autocast_enabled(q.device.type) else o.to(q.dtype)


def earlier_contexts(
    batch_size: int, cross_batch_range: int, cross_batch_stepping: bool, dataset_packing: int
) -> tuple[int, ...]:
    """How many rows before it each row of a batch sees.

    Args:
        batch_size: rows, a multiple of dataset_packing.
        cross_batch_range: d, the most that any row sees; never more than there are before it.
        cross_batch_stepping: row i of a document sees min(i * ceil((d + 1) / (k - 1)), d) rows, k = dataset_packing, so
            that one batch trains several ranges at once; False: every row sees d.
        dataset_packing: k, rows that one document fills.

    >>> earlier_contexts(8, 3, True, 4)  # the paper's 3B: (positives, negatives) (0,0) (1,1) (2,1) (3,0) in each four
    (0, 1, 2, 3, 0, 2, 3, 3)

    (The first document of a batch has no rows before it to be its negatives.)
    """
    check_whole(1, cross_batch_range=cross_batch_range, dataset_packing=dataset_packing)
    if batch_size % dataset_packing:
        raise ValueError(
            f"a batch of {batch_size} is not divisible by dataset_packing {dataset_packing} (rows of one document)."
        )
    step = -(-(cross_batch_range + 1) // max(dataset_packing - 1, 1))
    counts = []
    for row in range(batch_size):
        seen = cross_batch_range
        if cross_batch_stepping and dataset_packing > 1:
            seen = min(row % dataset_packing * step, cross_batch_range)
        counts.append(min(seen, row))
    return tuple(counts)
