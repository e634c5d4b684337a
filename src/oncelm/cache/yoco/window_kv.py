"""The past of a sliding-window layer.

Four forms: decoding, decode steps in a CUDA graph, training, context parallelism.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.distributed import ProcessGroup

from oncelm.cache.batch import Batch, Group
from oncelm.cache.yoco.recurrent_state import FixedSize
from oncelm.ops import decode_attention, global_attention, window_attention
from oncelm.ops.context_parallel import previous_tokens
from oncelm.utils.memory import checked_zeros


class WindowKV(FixedSize):
    """The last W keys and values, k, v [N, W, H_kv, D], of N sequences in a ring: position p lives in slot p mod W.

    Keys are already rotated.
    """

    tensor_names: tuple[str, ...] = ("k", "v")

    def __init__(
        self,
        batch_size: int,
        window_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        shape = (batch_size, window_size, num_kv_heads, head_dim)
        what = f"a window of {window_size:,} tokens"
        self.k = checked_zeros(shape, dtype, device, what)
        self.v = checked_zeros(shape, dtype, device, what)

    @property
    def window_size(self) -> int:
        return self.k.shape[1]

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [B, T, H, D] of the batch's tokens, whose keys and values take the oldest ones' places."""
        dtype = q.dtype
        q, k, v = (x.to(self.k.dtype) for x in (q, k, v))  # a cache may be of a narrower dtype than the model
        if self.recording:
            self.remember(batch, partial(self._redo, k, v))
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

    def _redo(self, k: torch.Tensor, v: torch.Tensor, batch: Batch, kept: Batch) -> None:
        for group, new in zip(batch.groups(), kept.groups(), strict=True):
            self._write(k[group.where][:, : new.length], v[group.where][:, : new.length], new)

    def step_form(self) -> StepWindow:
        return StepWindow(self)


class StepWindow:
    """The ring at one new token a sequence. It holds just what that sees, and softmax asks for no order."""

    def __init__(self, held: WindowKV) -> None:
        self.held = held

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [N, 1, H, D]."""
        held, position = self.held, batch.positions[:, 0]
        rows, slots = torch.arange(len(q), device=q.device), position % held.window_size
        held.k[rows, slots], held.v[rows, slots] = k[:, 0].to(held.k.dtype), v[:, 0].to(held.v.dtype)
        lengths = (position + 1).clamp(max=held.window_size)
        return decode_attention(q.to(held.k.dtype), held.k, held.v, lengths=lengths).to(q.dtype)


class FreshWindow:
    """No earlier keys; gradients flow through all of it."""

    def __init__(self, window_size: int) -> None:
        self.window_size = window_size

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [B, T, H, D]."""
        longest = max(batch.lengths, default=0)
        return window_attention(q, k, v, window_size=self.window_size, cu_seqlens=batch.cu_seqlens, max_seqlen=longest)


class ChunkWindow:
    """A chunk whose first queries see the end of the chunk before, which another rank holds."""

    def __init__(self, window_size: int, group: ProcessGroup) -> None:
        self.window_size, self.group = window_size, group

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [B, T, H, D]."""
        heads = k.shape[2]
        past = previous_tokens(torch.cat((k, v), dim=2), self.window_size - 1, self.group)
        outputs = []
        for group in batch.groups():
            # a slice even where it is empty: the gradient must pass through the exchange on every rank
            seen = past[group.where[0], past.shape[1] - min(group.start, past.shape[1]) :]
            keys = torch.cat((seen[:, :, :heads], k[group.where]), dim=1)
            values = torch.cat((seen[:, :, heads:], v[group.where]), dim=1)
            outputs.append(window_attention(q[group.where], keys, values, window_size=self.window_size))
        return batch.join(outputs)
