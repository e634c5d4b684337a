"""The state of one gated-retention layer: all that it remembers of a sequence, of fixed size."""

from __future__ import annotations

from collections import deque

import torch

from oncelm.cache.batch import HISTORY, Batch
from oncelm.ops import gated_retention
from oncelm.utils.memory import checked_zeros


class RetentionState:
    """state [N, H, K, V] float32 for N sequences."""

    tensor_names = ("state",)

    def __init__(self, batch_size: int, num_heads: int, key_dim: int, value_dim: int, device: torch.device) -> None:
        shape = (batch_size, num_heads, key_dim, value_dim)
        self.state = checked_zeros(shape, torch.float32, device, f"a state of {batch_size:,} sequences")
        self.recording = False
        self.history: deque[tuple] = deque(maxlen=HISTORY)

    def retain(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [B, T, H, V] of the batch's tokens; the state moves past them."""
        if self.recording:
            self.history.append((self.state.clone(), k, v, g, batch))
        o, final_state = gated_retention(
            q, k, v, g, initial_state=self.state, output_final_state=True, cu_seqlens=batch.cu_seqlens
        )
        assert final_state is not None
        self.state.copy_(final_state)
        return o

    def rewind(self, kept: Batch) -> None:
        """Forget the last recorded forward pass but the first `kept.lengths` tokens of each sequence."""
        before, k, v, g, batch = self.history.pop()
        for group, new in zip(batch.groups(), kept.groups(), strict=True):
            keys, values, gates = (x[group.where][:, : new.length] for x in (k, v, g))
            _, state = gated_retention(
                keys, keys, values, gates, initial_state=before[group.rows], output_final_state=True
            )
            assert state is not None
            self.state[group.rows] = state
