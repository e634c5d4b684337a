"""The layers of a YocoCache for one new token a sequence at positions that only the device knows.

The layer caches of decoding learn from the Batch how long each sequence is, as numbers on the host. A CUDA graph is
recorded once and replayed at every later position, so nothing in it may depend on such a number. These objects stand on
the same tensors and do the same with positions held in a tensor.
"""

from __future__ import annotations

import torch

from oncelm.cache.batch import Batch
from oncelm.cache.yoco.cache import YocoCache
from oncelm.cache.yoco.retention_state import RetentionState
from oncelm.cache.yoco.shared_kv import SharedKV
from oncelm.cache.yoco.window_kv import WindowKV
from oncelm.ops import decode_attention, gated_retention_step


class StepRetention:
    """Gated retention that changes the states in place."""

    def __init__(self, held: RetentionState) -> None:
        self.held = held

    def retain(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [N, 1, H, V]."""
        return gated_retention_step(q, k, v, g, self.held.state)


class StepWindow:
    """The ring of a sliding-window layer. It holds just what the new token sees, and softmax asks for no order."""

    def __init__(self, held: WindowKV) -> None:
        self.held = held

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [N, 1, H, D]."""
        held, position = self.held, batch.positions[:, 0]
        rows, slots = torch.arange(len(q), device=q.device), position % held.window_size
        held.k[rows, slots], held.v[rows, slots] = k[:, 0].to(held.k.dtype), v[:, 0].to(held.v.dtype)
        lengths = (position + 1).clamp(max=held.window_size)
        return decode_attention(q.to(held.k.dtype), held.k, held.v, lengths=lengths).to(q.dtype)


class StepShared:
    """The shared keys and values."""

    def __init__(self, held: SharedKV) -> None:
        self.held = held

    def append(self, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> None:
        """Store k, v [N, 1, H_kv, D] at the batch's positions."""
        self.held.store_at(k, v, batch.positions)
        self.lengths = batch.positions[:, 0] + 1  # once for all layers that read

    def attend(self, q: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [N, 1, H, D]."""
        return self.held.attend_at(q, self.lengths)


class StepPast:
    """A YocoCache as a model's past for one step. Its lengths are the caller's to check before and commit after."""

    def __init__(self, cache: YocoCache) -> None:
        self.layers = [
            StepRetention(layer) if isinstance(layer, RetentionState) else StepWindow(layer) for layer in cache.layers
        ]
        self.shared = None if cache.shared is None else StepShared(cache.shared)
