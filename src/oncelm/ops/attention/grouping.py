"""Attention in parts: some heads and some queries at a time, for less memory at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch


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
