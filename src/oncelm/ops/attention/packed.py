"""Sequences side by side in one row: where each begins, and how to compute them one after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from oncelm.ops.packed import check_cu_seqlens


@dataclass(frozen=True)
class Borders:
    """The borders [N + 1] (int32) of N sequences' queries and keys, and bounds on their lengths."""

    queries: torch.Tensor
    keys: torch.Tensor
    max_queries: int
    max_keys: int

    @classmethod
    def packed(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        cu_seqlens: torch.Tensor,
        cu_seqlens_k: torch.Tensor | None,
        max_seqlen: int | None,
    ) -> Borders:
        """Of packed q [1, P, H, D] and k [1, S, H_kv, D]; ValueError where borders do not fit them."""
        if q.shape[0] != 1:
            raise ValueError(f"packed sequences (cu_seqlens) need batch size 1, got {q.shape[0]}.")
        check_cu_seqlens("cu_seqlens", cu_seqlens, q.shape[1])
        if cu_seqlens_k is None:
            if k.shape[1] != q.shape[1]:
                raise ValueError(f"{q.shape[1]} packed queries have {k.shape[1]} keys: give cu_seqlens_k too.")
            cu_seqlens_k = cu_seqlens
        else:
            check_cu_seqlens("cu_seqlens_k", cu_seqlens_k, k.shape[1])
            if cu_seqlens_k.shape != cu_seqlens.shape:
                raise ValueError(
                    f"cu_seqlens packs {len(cu_seqlens) - 1} sequences, cu_seqlens_k {len(cu_seqlens_k) - 1}."
                )
            if cu_seqlens.device.type == "cpu" and bool((cu_seqlens_k.diff() < cu_seqlens.diff()).any()):
                raise ValueError("cu_seqlens_k gives a sequence fewer keys than cu_seqlens gives it queries.")
        longest = max_seqlen or int(cu_seqlens_k.diff().max())
        queries, keys = (x.to(q.device, torch.int32) for x in (cu_seqlens, cu_seqlens_k))
        return cls(queries, keys, min(longest, q.shape[1]), min(longest, k.shape[1]))

    @classmethod
    def dense(cls, B: int, T: int, S: int, device: torch.device) -> Borders:
        """Of B sequences with T queries and S keys each."""
        queries, keys = (torch.arange(B + 1, dtype=torch.int32, device=device) * n for n in (T, S))
        return cls(queries, keys, T, S)


def by_sequence(
    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    borders: Borders,
) -> torch.Tensor:
    """compute(q, k, v) of each packed sequence on its own, side by side again."""
    outputs = [
        compute(q[:, a:b], k[:, c:d], v[:, c:d])
        for (a, b), (c, d) in zip(pairwise(borders.queries.tolist()), pairwise(borders.keys.tolist()), strict=True)
    ]
    return torch.cat(outputs, dim=1)
