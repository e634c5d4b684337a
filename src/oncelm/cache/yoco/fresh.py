"""Layer caches that hold nothing: every sequence starts at its first token, and gradients flow through all of it.

A full forward pass (training, scoring) uses these where decoding uses RetentionState, WindowKV and SharedKV; the model
calls the same methods on either.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from oncelm.cache.batch import Batch, borders
from oncelm.cache.yoco.shared_kv import attend_by_group
from oncelm.ops import gated_retention, global_attention, window_attention


class FreshRetention:
    """Gated retention from a zero state."""

    def retain(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [B, T, H, V]."""
        return gated_retention(q, k, v, g, cu_seqlens=batch.cu_seqlens)[0]


class FreshWindow:
    """Sliding-window attention with no earlier keys."""

    def __init__(self, window_size: int) -> None:
        self.window_size = window_size

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [B, T, H, D]."""
        longest = max(batch.lengths, default=0)
        return window_attention(q, k, v, window_size=self.window_size, cu_seqlens=batch.cu_seqlens, max_seqlen=longest)


class FreshShared:
    """The shared keys and values of this forward pass only, kept in its autograd graph."""

    def append(self, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> None:
        """Hold k, v [B, T, H_kv, D]; the first tokens of their sequences."""
        self.k, self.v, self.batch = k, v, batch
        self.plan: tuple[Batch, tuple[torch.Tensor | None, torch.Tensor, int]] | None = None

    def attend(self, q: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [B, P, H, D] of queries at the batch's positions."""
        if batch.contiguous and batch.cu_seqlens is not None:
            if self.plan is None or self.plan[0] is not batch:  # all layers ask for the same
                self.plan = (batch, self._prefixes(batch))
            index, cu_seqlens_k, longest = self.plan[1]
            k, v = ((x.flatten(0, 1) if index is None else x.flatten(0, 1)[index])[None] for x in (self.k, self.v))
            return global_attention(q, k, v, cu_seqlens=batch.cu_seqlens, cu_seqlens_k=cu_seqlens_k, max_seqlen=longest)
        if self.batch.cu_seqlens is None:
            return attend_by_group(q, batch, lambda group: (self.k[group.rows], self.v[group.rows]))
        places = {group.rows.start: group.where for group in self.batch.groups()}
        return attend_by_group(
            q, batch, lambda group: (self.k[places[group.rows.start]], self.v[places[group.rows.start]])
        )

    def _prefixes(self, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor, int]:
        """Which keys come up to each sequence's last query (None: all), their borders, and the longest's length."""
        ends = [start + length if length else 0 for start, length in zip(batch.starts, batch.lengths, strict=True)]
        device = self.k.device
        index = None
        if tuple(ends) != self.batch.lengths:
            firsts = accumulate(self.batch.lengths[:-1], initial=0)
            parts = [torch.arange(first, first + end) for first, end in zip(firsts, ends, strict=True)]
            index = torch.cat(parts).to(device)
        return index, borders(ends, device), max(ends)


class FreshPast:
    """What a model cache offers to a forward pass, without what came before."""

    def __init__(self, layers: list[FreshRetention | FreshWindow]) -> None:
        self.layers = layers
        self.shared = FreshShared()
