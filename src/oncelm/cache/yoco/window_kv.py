"""The past of a sliding-window layer.

Five forms: decoding, decode steps in a CUDA graph, the slots of an engine, training, context parallelism.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.distributed import ProcessGroup

from oncelm.cache.batch import Batch
from oncelm.cache.yoco.places import Places
from oncelm.cache.yoco.recurrent_state import FixedSize
from oncelm.ops import decode_attention, global_attention, window_attention
from oncelm.ops.attention import has_decode_kernel, masked_attention
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
            outputs.append(self.read(queries, keys, values, group.rows, group.start))
            self.write(keys, values, group.rows, group.start)
        return batch.join(outputs).to(dtype)

    def read(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rows: slice | torch.Tensor, start: int
    ) -> torch.Tensor:
        """Outputs [b, T, H, D] of tokens at start, start + 1, ... of sequences `rows`: a slice, or numbers [b, 1]."""
        # the window_size - 1 tokens before the first one, in order
        places = torch.arange(max(0, start - self.window_size + 1), start, device=k.device) % self.window_size
        all_k = torch.cat((self.k[rows, places], k), dim=1)
        all_v = torch.cat((self.v[rows, places], v), dim=1)
        return window_attention(q, all_k, all_v, window_size=self.window_size)

    def _attend_one(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One new token a sequence: the ring then holds just what the token sees, and softmax asks for no order."""
        rows = torch.arange(batch.num_sequences, device=k.device)
        slots = (batch.positions % self.window_size).flatten().expand(batch.num_sequences)
        self.k[rows, slots], self.v[rows, slots] = k[:, 0], v[:, 0]
        if batch.is_uniform:
            held = min(batch.starts[0] + 1, self.window_size)
            return global_attention(q, self.k[:, :held], self.v[:, :held])
        return global_attention(q, self.k, self.v, positions=batch.positions.clamp(max=self.window_size - 1))

    def write(self, k: torch.Tensor, v: torch.Tensor, rows: slice | torch.Tensor, start: int) -> None:
        """Put the last min(T, W) of k, v [b, T, H_kv, D], of tokens at start, start + 1, ..., into their places."""
        count, end = min(k.shape[1], self.window_size), start + k.shape[1]
        places = torch.arange(end - count, end, device=k.device) % self.window_size
        self.k[rows, places] = k[:, k.shape[1] - count :]
        self.v[rows, places] = v[:, v.shape[1] - count :]

    def _redo(self, k: torch.Tensor, v: torch.Tensor, batch: Batch, kept: Batch) -> None:
        for group, new in zip(batch.groups(), kept.groups(), strict=True):
            self.write(k[group.where][:, : new.length], v[group.where][:, : new.length], new.rows, new.start)

    def step_form(self) -> StepWindow:
        return StepWindow(self)

    def pool_form(self, places: Places) -> SlotWindow:
        return SlotWindow(self, places)


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


class SlotWindow:
    """Rings that stand in the slots of a pool."""

    def __init__(self, held: WindowKV, places: Places) -> None:
        self.held, self.places = held, places

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [B, T, H, D]; keys and values of the tokens that count take the oldest ones' places."""
        dtype = q.dtype
        q, k, v = (x.to(self.held.k.dtype) for x in (q, k, v))
        if isinstance(self.places.kept, torch.Tensor):
            return self._attend_few(q, k, v, batch).to(dtype)
        if batch.cu_seqlens is None and q.shape[1] == 1 and self.places.kept is None:
            return self._attend_one(q, k, v, batch).to(dtype)
        outputs, first = [], 0
        for n, (start, length) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
            tokens = (slice(n, n + 1),) if batch.cu_seqlens is None else (slice(None), slice(first, first + length))
            queries, keys, values = (x[tokens] for x in (q, k, v))
            rows = self.places.slots[n : n + 1, None]
            outputs.append(self.held.read(queries, keys, values, rows, start))
            kept = length if self.places.kept is None else self.places.kept[n]
            self.held.write(keys[:, :kept], values[:, :kept], rows, start)
            first += length
        return batch.join(outputs).to(dtype)

    def _attend_few(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """A few new tokens a sequence, of which the device knows how many count: over what lies in the ring, in any
        order, and what is new."""
        held, (sees, slots, places) = self.held, self.places.drafted(batch, self.held.window_size)
        all_k, all_v = (torch.cat((x[self.places.slots], new), dim=1) for x, new in ((held.k, k), (held.v, v)))
        held.k[slots, places], held.v[slots, places] = k, v
        return masked_attention(q, all_k, all_v, sees)

    def _attend_one(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One new token a sequence: the ring then holds just what it sees, and softmax asks for no order."""
        held, slots, W = self.held, self.places.slots, self.held.window_size
        place, lengths, block, tables = self.places.ring(batch, W)
        held.k[slots, place], held.v[slots, place] = k[:, 0], v[:, 0]
        if batch.starts and not has_decode_kernel(q, held.k):  # one after the other, where they stand
            seen = [slice(min(start + 1, W)) for start in batch.starts]
            rows = [slice(slot, slot + 1) for slot in self.places.slot_numbers]
            return torch.cat(
                [
                    global_attention(q[n : n + 1], held.k[row, keys], held.v[row, keys])
                    for n, (row, keys) in enumerate(zip(rows, seen, strict=True))
                ]
            )
        if tables is None:
            return decode_attention(q, held.k[slots], held.v[slots], lengths=lengths)
        pages = (x.view(-1, block, *x.shape[2:]) for x in (held.k, held.v))
        return decode_attention(q, *pages, lengths=lengths, block_tables=tables)


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
