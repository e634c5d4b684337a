"""A LongLLaMA memory layer whose memory is kept apart from its local cache: streamed in blocks, or searched.

Local keys and memory are two disjoint sets, attended to separately and joined by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from oncelm.cache.longllama.local_kv import RawKeys
from oncelm.cache.longllama.segment import Segment, same_counts
from oncelm.cache.rows import Rows
from oncelm.ops.attention.partial import join_attention, partial_attention


class MemoryStore(Protocol):
    """Where a memory's keys and values are: MemoryBlocks or MemoryIndex."""

    @property
    def dtype(self) -> torch.dtype:
        """What they are stored in."""
        ...

    def append(self, rows: slice, k: torch.Tensor, v: torch.Tensor, at: int) -> None:
        """Remember k, v [n, t, H_kv, D] of sequences `rows`, which hold `at` tokens already."""
        ...

    def attend(self, q: torch.Tensor, rows: slice, held: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(o [n, T, H, D], lse [n, T, H]) of q [n, T, H, D] over the first `held` tokens of sequences `rows`."""
        ...

    def contents(self, rows: slice, held: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """k, v [n, s, H_kv, D] of the first `held` tokens, part by part, on the CPU."""
        ...

    def keep_rows(self, index: torch.Tensor, remembered: tuple[int, ...]) -> None:
        """Keep sequences `index` [M], in that order."""
        ...

    def nbytes(self) -> int: ...


class RemoteMemory(Rows):
    """k, v [N, S, H_kv, D]: the local cache; behind it a MemoryStore."""

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        store: MemoryStore,
    ) -> None:
        super().__init__(batch_size, 1, num_kv_heads, head_dim, dtype, device)
        self.raw_keys = RawKeys(batch_size, 1, num_kv_heads, head_dim, dtype, device)
        self.store = store

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, raw_k: torch.Tensor, v: torch.Tensor, segment: Segment
    ) -> torch.Tensor:
        """As MemoryKV.attend."""
        if segment.fate == "local":
            self.reserve(max(segment.batch.ends))
            self.raw_keys.reserve(max(segment.batch.ends))
        outputs = []
        for group, held in segment.groups():
            queries, keys, raw, values = (x[group.where] for x in (q, k, raw_k, v))
            if group.length == 0:
                outputs.append(queries)
                continue
            if segment.fate == "local":
                span = slice(group.start, group.start + group.length)
                self.k[group.rows, span], self.v[group.rows, span] = keys, values
                self.raw_keys.raw[group.rows, span] = raw
                keys, values = self.k[group.rows, : span.stop], self.v[group.rows, : span.stop]
            part = partial_attention(queries, keys, values, start=group.start)
            if held:
                part = join_attention(part, self.store.attend(queries, group.rows, held))
            outputs.append(part[0].to(q.dtype))
            if segment.fate == "memory":
                assert group.start == 0, "a window that goes to memory at once has no local cache before it"
                self.store.append(group.rows, raw, values, held)
        return segment.batch.join(outputs)

    def spill(self, remembered: tuple[int, ...], local: tuple[int, ...]) -> None:
        """The local cache becomes memory."""
        for rows, (held, count) in same_counts(remembered, local):
            self.store.append(rows, self.raw_keys.raw[rows, :count], self.v[rows, :count], held)

    @property
    def memory_dtype(self) -> torch.dtype:
        return self.store.dtype

    def nbytes(self) -> int:
        return super().nbytes() + self.raw_keys.nbytes() + self.store.nbytes()

    def state(self, remembered: tuple[int, ...], local: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Copies of what is in use, by name; the same names for every kind of memory."""
        N, _, H_kv, D = self.k.shape
        memory: dict[str, torch.Tensor] = {}
        for rows, (held,) in same_counts(remembered):
            first = 0
            for parts in self.store.contents(rows, held):
                for name, part in zip("kv", parts, strict=True):
                    if name not in memory:
                        memory[name] = torch.zeros(N, max(remembered), H_kv, D, dtype=part.dtype)
                    memory[name][rows, first : first + part.shape[1]] = part
                first += parts[0].shape[1]
        empty = torch.zeros(N, 0, H_kv, D, dtype=self.k.dtype)
        own = {"k": self.k, "v": self.v, "raw": self.raw_keys.raw}
        return {f"memory_{name}": memory.get(name, empty) for name in "kv"} | {
            name: tensor[:, : max(local)].clone() for name, tensor in own.items()
        }

    def load(self, state: dict[str, torch.Tensor], remembered: tuple[int, ...], local: tuple[int, ...]) -> None:
        """Take in what `state` gave, of a memory of any kind; the store must be empty."""
        for rows, (held,) in same_counts(remembered):
            if held:
                self.store.append(rows, state["memory_k"][rows, :held], state["memory_v"][rows, :held], 0)
        for target in (self, self.raw_keys):
            target.reserve(max(local))
            for name in target.tensor_names:
                getattr(target, name)[:, : max(local)] = state[name]

    def keep_rows(self, index: torch.Tensor, remembered: tuple[int, ...], local: tuple[int, ...]) -> None:
        """Keep sequences `index` [M], in that order."""
        self.select(index, max(local))
        self.raw_keys.select(index, max(local))
        self.store.keep_rows(index, remembered)
