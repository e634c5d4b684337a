"""What the layers of a LongLLaMA attend to in a forward pass with gradients, which starts without earlier tokens.

LocalKV and MemoryKV are for passes without gradients; the model calls the same method on either. Every method may be
called twice with the same window, with the same result, since gradient checkpointing runs layers twice.
"""

from __future__ import annotations

import torch

from oncelm.cache.longllama.segment import Segment
from oncelm.ops import global_attention
from oncelm.ops.crossbatch import attend_contexts


class FreshLocal:
    """Causal attention within each window."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, raw_k: torch.Tensor, v: torch.Tensor, segment: Segment
    ) -> torch.Tensor:
        """Outputs [B, T, H, D]."""
        parts = (tuple(x[group.where] for x in (q, k, v)) for group in segment.batch.groups())
        return segment.batch.join([global_attention(*part) for part in parts])


class FreshMemory:
    """Differentiable memory: the keys and values of earlier windows, as the graph's own tensors."""

    def __init__(self) -> None:
        self.past: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}  # first row of a group -> a pair a window

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, raw_k: torch.Tensor, v: torch.Tensor, segment: Segment
    ) -> torch.Tensor:
        """Outputs [B, T, H, D] over the windows before this one (whole) and this one (causally)."""
        outputs = []
        for group, _ in segment.groups():
            queries, keys, raw, values = (x[group.where] for x in (q, k, raw_k, v))
            past = self.past.setdefault(group.rows.start, [])
            if len(past) == segment.index:
                past.append((raw, values))
            earlier = past[: segment.index]
            all_k = torch.cat([*(pair[0] for pair in earlier), keys], dim=1)
            all_v = torch.cat([*(pair[1] for pair in earlier), values], dim=1)
            outputs.append(global_attention(queries, all_k, all_v))
        return segment.batch.join(outputs)


class CrossbatchMemory:
    """Crossbatch training: the rows before a row are its memory.

    Args:
        counts: how many of them each row sees (`oncelm.ops.crossbatch.earlier_contexts`).
    """

    def __init__(self, counts: tuple[int, ...]) -> None:
        self.counts = counts

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, raw_k: torch.Tensor, v: torch.Tensor, segment: Segment
    ) -> torch.Tensor:
        """Outputs [B, T, H, D]; each row is one whole context."""
        return attend_contexts(q, k, raw_k, v, self.counts)
