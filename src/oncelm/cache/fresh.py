"""Layer caches that hold nothing: every sequence starts at its first token, and gradients flow through all of it.

A full forward pass (training, scoring) uses these where decoding uses RetentionState, WindowKV and SharedKV; the model
calls the same methods on either.
"""

from __future__ import annotations

import torch

from oncelm.cache.batch import Batch
from oncelm.cache.shared_kv import FreshSharedKV
from oncelm.ops import gated_retention, window_attention


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


class FreshCache:
    """What a model cache offers to a forward pass, without the memory."""

    def __init__(self, layers: list[FreshRetention | FreshWindow]) -> None:
        self.layers = layers
        self.shared = FreshSharedKV()
