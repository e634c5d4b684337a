"""One segment of a LongLLaMA forward pass: its tokens, how many came before, and where their keys and values go.

Long input is cut into windows. Within one, every layer attends locally; memory layers also see the memory. `fate`
says where a window's keys and values go afterwards: "memory" (memory layers add them to memory, other layers drop
them), "local" (all layers keep them, as the local cache of decoding) or "dropped" (in a pass without a cache).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from oncelm.cache.batch import Batch, Group


@dataclass(frozen=True)
class Segment:
    """Attributes:
    batch: the tokens; `batch.starts` and positions count from the start of the local cache.
    remembered: N counts of tokens in memory.
    fate: "memory", "local" or "dropped".
    index: number of the window in this pass.
    """

    batch: Batch
    remembered: tuple[int, ...]
    fate: str
    index: int = 0

    def groups(self) -> Iterator[tuple[Group, int]]:
        """Sequences that can be computed together, and the tokens that each of them has in memory."""
        for group in self.batch.groups():
            counts = self.remembered[group.rows]
            if len(set(counts)) == 1:
                yield group, counts[0]
                continue
            for n, count in enumerate(counts):  # a dense batch whose memories differ in length
                row = slice(n, n + 1)
                yield replace(group, rows=row, where=(row, slice(None))), count


class LayerMemory(Protocol):
    """What one layer attends to: LocalKV, MemoryKV, RemoteMemory, FreshLocal, FreshMemory or CrossbatchMemory."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, raw_k: torch.Tensor, v: torch.Tensor, segment: Segment
    ) -> torch.Tensor:
        """q [B, T, H, D] and k [B, T, H_kv, D] rotated, raw_k as at position 0, v [B, T, H_kv, D] -> [B, T, H, D]."""
        ...


def same_counts(*counts: tuple[int, ...]) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Rows that agree in all counts [N], as (rows, their counts): all at once if they all do, else one by one."""
    each = list(zip(*counts, strict=True))
    if len(set(each)) == 1:
        yield slice(0, len(each)), each[0]
    else:
        for n, row in enumerate(each):
            yield slice(n, n + 1), row
