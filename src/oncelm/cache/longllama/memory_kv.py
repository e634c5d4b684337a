"""Memory and local cache of one LongLLaMA memory layer, in one tensor on the model's device; attention is exact.

Memory keys stand at local position 0 and are seen by every query, local keys are seen causally. With the memory first
and the local cache right behind it in one tensor, both together are plain causal attention of queries that start after
the memory: one SDPA call reads both, and nothing is copied or concatenated.

    slots   0 ........ remembered - 1 | remembered ...... + local - 1 | free
    keys    as at position 0          | rotated to their positions    |
"""

from __future__ import annotations

import torch

from oncelm.cache.longllama.local_kv import RawKeys
from oncelm.cache.longllama.segment import Segment, same_counts
from oncelm.cache.rows import Rows
from oncelm.ops import decode_attention, global_attention
from oncelm.ops.attention import MOST_DECODED, has_decode_kernel
from oncelm.ops.attention.grouping import attention_groups


class MemoryKV(Rows):
    """k, v [N, S, H_kv, D] in the model's dtype: the memory, then the local cache."""

    growth = 1.25  # a memory may be most of the device

    def __init__(
        self,
        batch_size: int,
        max_tokens: int | None,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        grouping: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(batch_size, max_tokens, num_kv_heads, head_dim, dtype, device)
        self.raw_keys = RawKeys(batch_size, 1, num_kv_heads, head_dim, dtype, device)
        self.grouping = grouping

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, raw_k: torch.Tensor, v: torch.Tensor, segment: Segment
    ) -> torch.Tensor:
        """Outputs [B, T, H, D] of the segment's tokens over memory and local cache; then stores them by `segment.fate`.

        q [B, T, H, D] and k [B, T, H_kv, D] are rotated to their positions in the window, raw_k to position 0.
        """
        dtype = q.dtype
        q, k, raw_k, v = (x.to(self.k.dtype) for x in (q, k, raw_k, v))  # autocast computes in another than the model's
        outputs = []
        few = segment.batch.cu_seqlens is None and 1 <= q.shape[1] <= MOST_DECODED and segment.fate == "local"
        at_once = few and self.grouping is None and has_decode_kernel(q, self.k)
        for group, held in segment.groups():
            queries, keys, raw, values = (x[group.where] for x in (q, k, raw_k, v))
            start = held + group.start
            if start or segment.fate != "dropped":
                end = start + group.length
                self.reserve(end)
                self.k[group.rows, start:end], self.v[group.rows, start:end] = keys, values
                keys, values = self.k[group.rows, :end], self.v[group.rows, :end]
            if not at_once:
                outputs.append(self._attend(queries, keys, values, start))
            if segment.fate == "memory":
                self.k[group.rows, start:end] = raw
            elif segment.fate == "local":
                stop = group.start + group.length
                self.raw_keys.reserve(stop)
                self.raw_keys.raw[group.rows, group.start : stop] = raw
        if at_once:
            seen = [held + end for held, end in zip(segment.remembered, segment.batch.ends, strict=True)]
            lengths = torch.tensor(seen).to(q.device, non_blocking=True)
            return decode_attention(q, self.k, self.v, lengths=lengths).to(dtype)
        return segment.batch.join(outputs).to(dtype)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
        """Outputs [B, T, H, D] of queries at slots start, start + 1, ..., as many at once as `grouping` allows."""
        groups = list(attention_groups(q, k.shape[2], self.grouping))
        if len(groups) == 1:
            return global_attention(q, k, v, start=start)
        out = torch.empty_like(q)
        for at, heads, kv in groups:
            out[:, at, heads] = global_attention(q[:, at, heads], k[:, :, kv], v[:, :, kv], start=start + at.start)
        return out

    def spill(self, remembered: tuple[int, ...], local: tuple[int, ...]) -> None:
        """The local cache becomes memory: its values are in place, its keys turn back to position 0."""
        for rows, (held, count) in same_counts(remembered, local):
            self.k[rows, held : held + count] = self.raw_keys.raw[rows, :count]

    @property
    def memory_dtype(self) -> torch.dtype:
        return self.k.dtype

    def nbytes(self) -> int:
        return super().nbytes() + self.raw_keys.nbytes()

    def state(self, remembered: tuple[int, ...], local: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Copies of what is in use, by name; the same names for every kind of memory."""
        parts = {"memory_k": (self.k, remembered, False), "memory_v": (self.v, remembered, False)}
        parts |= {"k": (self.k, local, True), "v": (self.v, local, True), "raw": (self.raw_keys.raw, local, False)}
        return {name: self._take(*part, remembered) for name, part in parts.items()}

    def _take(
        self, source: torch.Tensor, counts: tuple[int, ...], behind_memory: bool, remembered: tuple[int, ...]
    ) -> torch.Tensor:
        out = self._allocate((len(counts), max(counts), *source.shape[2:]), source.dtype, source.device)
        for rows, (held, count) in same_counts(remembered, counts):
            first = held if behind_memory else 0
            out[rows, :count] = source[rows, first : first + count]
        return out

    def load(self, state: dict[str, torch.Tensor], remembered: tuple[int, ...], local: tuple[int, ...]) -> None:
        """Take in what `state` gave, of a memory of any kind."""
        self.reserve(max(held + count for held, count in zip(remembered, local, strict=True)))
        self.raw_keys.reserve(max(local))
        for rows, (held, count) in same_counts(remembered, local):
            for target, name in ((self.k, "k"), (self.v, "v")):
                target[rows, :held] = state[f"memory_{name}"][rows, :held].to(target.dtype)
                target[rows, held : held + count] = state[name][rows, :count]
            self.raw_keys.raw[rows, :count] = state["raw"][rows, :count]

    def keep_rows(self, index: torch.Tensor, remembered: tuple[int, ...], local: tuple[int, ...]) -> None:
        """Keep sequences `index` [M], in that order."""
        self.select(index, max(held + count for held, count in zip(remembered, local, strict=True)))
        self.raw_keys.select(index, max(local))
