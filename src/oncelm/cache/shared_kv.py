"""The one global key/value cache that every layer of the cross-decoder reads."""

from __future__ import annotations

from collections.abc import Callable

import torch

from oncelm.cache.batch import Batch, Group
from oncelm.ops import global_attention


class SharedKV:
    """k, v [N, S, H_kv, D] for N sequences of up to S tokens, keys already rotated.

    Rows are written where `batch.positions` says and never moved. With `max_tokens=None` the capacity S doubles when it
    is exceeded; otherwise it is fixed, and the model cache refuses longer input.
    """

    tensor_names = ("k", "v")
    first_capacity = 256

    def __init__(
        self,
        batch_size: int,
        max_tokens: int | None,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch_size, self.first_capacity if max_tokens is None else max_tokens, num_kv_heads, head_dim)
        self.k, self.v = (self._allocate(shape, dtype, device) for _ in self.tensor_names)

    @staticmethod
    def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor [N, S, H_kv, D] that lies in memory head by head.

        Decoding reads one head's rows after the other; on a CPU it is up to twice as fast when they are neighbours.
        """
        N, S, H_kv, D = shape
        # zeros, not empty: a masked key has weight 0, and 0 times a NaN of uninitialised memory is NaN
        return torch.zeros(N, H_kv, S, D, dtype=dtype, device=device).transpose(1, 2)

    @property
    def capacity(self) -> int:
        """Tokens that fit in each sequence."""
        return self.k.shape[1]

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` a sequence; each growth at least doubles, so copies stay linear in all."""
        if num_tokens <= self.capacity:
            return
        capacity = self.capacity
        for name in self.tensor_names:
            old = getattr(self, name)
            shape = (old.shape[0], max(num_tokens, 2 * capacity), *old.shape[2:])
            new = self._allocate(shape, old.dtype, old.device)
            new[:, :capacity] = old
            setattr(self, name, new)

    def select(self, index: torch.Tensor, num_tokens: int) -> None:
        """Keep sequences `index` [M], of which `num_tokens` rows are in use; in place where M is N."""
        for name in self.tensor_names:
            old = getattr(self, name)
            new = old if len(index) == len(old) else self._allocate((len(index), *old.shape[1:]), old.dtype, old.device)
            new[:, :num_tokens] = old[index, :num_tokens]
            setattr(self, name, new)

    def append(self, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> None:
        """Store the keys and values [B, T, H_kv, D] of the batch's tokens at their positions."""
        self.reserve(max(batch.ends))
        for group in batch.groups():
            span = slice(group.start, group.start + group.length)
            self.k[group.rows, span] = k[group.where].to(self.k.dtype)
            self.v[group.rows, span] = v[group.where].to(self.v.dtype)

    def attend(self, q: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [B, P, H, D] of queries at the batch's positions; their own keys must have been appended."""
        queries = q.to(self.k.dtype)  # a cache may be of a narrower dtype than the model
        if batch.cu_seqlens is None and batch.lengths[0] == 1 and not batch.is_uniform:
            seen = max(batch.ends)  # one new token a sequence, sequences of different lengths
            out = global_attention(queries, self.k[:, :seen], self.v[:, :seen], positions=batch.positions)
        else:
            out = attend_by_group(queries, batch, lambda group: (self.k[group.rows], self.v[group.rows]))
        return out.to(q.dtype)


class FreshSharedKV:
    """The same without storage: the keys and values of this forward pass only, kept in its autograd graph."""

    def append(self, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> None:
        """Hold k, v [B, T, H_kv, D]; the first tokens of their sequences."""
        self.k, self.v, self.batch = k, v, batch

    def attend(self, q: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [B, P, H, D] of queries at the batch's positions."""
        if self.batch.cu_seqlens is None:
            return attend_by_group(q, batch, lambda group: (self.k[group.rows], self.v[group.rows]))
        places = {group.rows.start: group.where for group in self.batch.groups()}
        return attend_by_group(
            q, batch, lambda group: (self.k[places[group.rows.start]], self.v[places[group.rows.start]])
        )


def attend_by_group(
    q: torch.Tensor, batch: Batch, keys_and_values: Callable[[Group], tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """Global attention of each group of queries over its own sequences' keys and values."""
    outputs = []
    for group in batch.groups():
        k, v = keys_and_values(group)
        queries = q[group.where]
        if batch.contiguous:
            outputs.append(global_attention(queries, k, v, start=group.start))
        else:
            rows = slice(0, 1) if batch.positions.shape[0] == 1 else group.where[0]
            positions = batch.positions[rows, group.where[1]]
            outputs.append(global_attention(queries, k[:, : group.end], v[:, : group.end], positions=positions))
    return batch.join(outputs)
