"""One window of a LongLLaMA pass: which tokens it holds, what lies before them, what becomes of them.

Long input is cut into windows. Within one, every layer attends locally; memory layers also see the memory. What happens
to a window's keys and values afterwards is its `fate`: "memory" (memory layers remember them, the others forget them),
"local" (all layers keep them, as the local cache of decoding) or "dropped" (the end of a pass without a cache).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from oncelm.cache.batch import Batch, Group


@dataclass(frozen=True)
class Window:
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


def same_counts(*counts: tuple[int, ...]) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Rows that agree in all counts [N], as (rows, their counts): all at once if they all do, else one by one."""
    each = list(zip(*counts, strict=True))
    if len(set(each)) == 1:
        yield slice(0, len(each)), each[0]
    else:
        for n, row in enumerate(each):
            yield slice(n, n + 1), row


def attention_groups(
    q: torch.Tensor, num_kv_heads: int, grouping: tuple[int, int] | None
) -> Iterator[tuple[slice, slice, slice]]:
    """(queries, query heads, their key/value heads) to process one after the other.

    grouping: at most (heads, queries) at a time, LongLLaMA's `mem_attention_grouping`; None means all at once.
    """
    T, H = q.shape[1:3]
    per_kv = H // num_kv_heads
    heads_at_once, queries_at_once = grouping or (H, max(T, 1))
    for first in range(0, T, queries_at_once):
        queries = slice(first, min(first + queries_at_once, T))
        if heads_at_once >= per_kv:
            step = heads_at_once // per_kv
            for kv in range(0, num_kv_heads, step):
                stop = min(kv + step, num_kv_heads)
                yield queries, slice(kv * per_kv, stop * per_kv), slice(kv, stop)
        else:
            for head in range(0, H, heads_at_once):  # never across two key/value heads
                for part in _split(head, min(head + heads_at_once, H), per_kv):
                    yield queries, part, slice(part.start // per_kv, part.start // per_kv + 1)


def _split(first: int, stop: int, size: int) -> Iterator[slice]:
    while first < stop:
        border = min(stop, (first // size + 1) * size)
        yield slice(first, border)
        first = border
