"""The last `window_size` keys and values of one sliding-window layer, in a ring: position p lives in slot p mod W."""

from __future__ import annotations

from collections import deque

import torch

from oncelm.cache.batch import HISTORY, Batch, Group
from oncelm.ops import global_attention, window_attention
from oncelm.utils.memory import checked_zeros


class WindowKV:
    """k, v [N, W, H_kv, D] for N sequences, keys already rotated."""

    tensor_names = ("k", "v")

    def __init__(
        self,
        batch_size: int,
        window_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch_size, window_size, num_kv_heads, head_dim)
        what = f"a window of {window_size:,} tokens"
        self.k = checked_zeros(shape, dtype, device, what)
        self.v = checked_zeros(shape, dtype, device, what)
        self.recording = False
        self.history: deque[tuple] = deque(maxlen=HISTORY)

    @property
    def window_size(self) -> int:
        return self.k.shape[1]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [B, T, H, D] of the batch's tokens, whose keys and values take the oldest ones' places."""
        dtype = q.dtype
        q, k, v = (x.to(self.k.dtype) for x in (q, k, v))  # a cache may be of a narrower dtype than the model
        if self.recording:
            self.history.append((self.k.clone(), self.v.clone(), k, v, batch))
        if batch.cu_seqlens is None and batch.lengths[0] == 1:
            return self._attend_one(q, k, v, batch).to(dtype)
        outputs = []
        for group in batch.groups():
            queries, keys, values = (x[group.where] for x in (q, k, v))
            # the window_size - 1 tokens before the group's first one, in order
            past = torch.arange(max(0, group.start - self.window_size + 1), group.start, device=k.device)
            slots = past % self.window_size
            all_k = torch.cat((self.k[group.rows, slots], keys), dim=1)
            all_v = torch.cat((self.v[group.rows, slots], values), dim=1)
            outputs.append(window_attention(queries, all_k, all_v, window_size=self.window_size))
            self._write(keys, values, group)
        return batch.join(outputs).to(dtype)

    def _attend_one(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One new token a sequence: the ring then holds just what the token sees, and softmax asks for no order."""
        rows = torch.arange(batch.num_sequences, device=k.device)
        slots = (batch.positions % self.window_size).flatten().expand(batch.num_sequences)
        self.k[rows, slots], self.v[rows, slots] = k[:, 0], v[:, 0]
        if batch.is_uniform:
            held = min(batch.starts[0] + 1, self.window_size)
            return global_attention(q, self.k[:, :held], self.v[:, :held])
        return global_attention(q, self.k, self.v, positions=batch.positions.clamp(max=self.window_size - 1))

    def _write(self, k: torch.Tensor, v: torch.Tensor, group: Group) -> None:
        """Put the last min(T, W) of the group's new tokens into their slots."""
        count = min(group.length, self.window_size)
        end = group.start + group.length
        slots = torch.arange(end - count, end, device=k.device) % self.window_size
        self.k[group.rows, slots] = k[:, k.shape[1] - count :]
        self.v[group.rows, slots] = v[:, v.shape[1] - count :]

    def rewind(self, kept: Batch) -> None:
        """Forget the last recorded forward pass but the first `kept.lengths` tokens of each sequence."""
        before_k, before_v, k, v, batch = self.history.pop()
        self.k.copy_(before_k)
        self.v.copy_(before_v)
        for group, new in zip(batch.groups(), kept.groups(), strict=True):
            self._write(k[group.where][:, : new.length], v[group.where][:, : new.length], new)
