"""Keys and values of all tokens, which every layer of the cross-decoder reads.

Four forms: decoding, decode steps in a CUDA graph, training, context parallelism. That of an engine's pages is in
paged_kv.py."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch.distributed import ProcessGroup

from oncelm.cache.batch import Batch, Group, borders
from oncelm.cache.rows import Rows
from oncelm.cache.yoco.paged_kv import PagedKV
from oncelm.cache.yoco.places import Places
from oncelm.ops import decode_attention, dequantize_kv, global_attention, quantize_kv
from oncelm.ops.attention import MOST_DECODED, has_decode_kernel
from oncelm.ops.context_parallel import all_chunks
from oncelm.ops.quantize import LARGEST, as_bytes

# what a cache can store keys and values in: floats, or 8 bits with a scale a vector
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, *LARGEST)


class SharedKV(Rows):
    """k, v [N, S, H_kv, D] for N sequences of up to S tokens, keys already rotated.

    Tokens are written where `batch.positions` says and never moved.

    k and v of float8_e4m3fn or int8 are quantised as they come, with k_scale, v_scale [N, S, H_kv] in float32.
    """

    grows = True

    def __init__(
        self,
        batch_size: int,
        max_tokens: int | None,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(batch_size, max_tokens, num_kv_heads, head_dim, dtype, device)
        self.k_scale: torch.Tensor | None = None
        self.v_scale: torch.Tensor | None = None
        if self.is_quantised:
            self.k_scale, self.v_scale = (self._allocate(self.k.shape[:3], torch.float32, device) for _ in range(2))
            self.tensor_names = ("k", "v", "k_scale", "v_scale")

    @property
    def is_quantised(self) -> bool:
        """Whether keys and values are stored in 8 bits."""
        return self.k.dtype in LARGEST

    # -- writing ---------------------------------------------------------------------------------------------------

    def append(self, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> None:
        """Store the keys and values [B, T, H_kv, D] of the batch's tokens at their positions."""
        self.reserve(max(batch.ends))
        for group in batch.groups():
            span = slice(group.start, group.start + group.length)
            self.store((group.rows, span), k[group.where], v[group.where])

    def record(self, on: bool) -> None:
        """Nothing: what is undone is written over."""

    def rewind(self, kept: Batch) -> None:
        """Nothing: what is undone is written over."""

    def store_at(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> None:
        """The same for T tokens of each of the N sequences at positions [N, T], which only the device knows.

        The host does not wait, and a CUDA graph can hold it. Room must have been reserved.
        """
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self.store((rows, positions), k, v)

    def store(self, where: tuple, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store keys and values [..., H_kv, D] at `where` among the first two dimensions."""
        for x, stored, stored_scale in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            if stored_scale is None:
                stored[where] = x.to(stored.dtype)
            else:
                values, scales = quantize_kv(x, stored.dtype)
                as_bytes(stored)[where] = as_bytes(values)
                stored_scale[where] = scales

    # -- reading ---------------------------------------------------------------------------------------------------

    def attend(self, q: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [B, P, H, D] of queries at the batch's positions; their own keys must have been appended."""
        few = batch.cu_seqlens is None and batch.contiguous and 1 <= batch.lengths[0] <= MOST_DECODED
        if few and (self.is_quantised or has_decode_kernel(q, self.k)):
            return self.attend_at(q, (batch.positions[:, -1] + 1).expand(q.shape[0]))
        if self.is_quantised:
            return self._attend_by_head(q, batch)
        queries = q.to(self.k.dtype)  # a cache may be of a narrower dtype than the model
        if batch.cu_seqlens is None and batch.lengths[0] == 1 and not batch.is_uniform:
            seen = max(batch.ends)  # one new token a sequence, sequences of different lengths
            out = global_attention(queries, self.k[:, :seen], self.v[:, :seen], positions=batch.positions)
        else:
            out = attend_by_group(queries, batch, lambda group: (self.k[group.rows], self.v[group.rows]))
        return out.to(q.dtype)

    def attend_at(self, q: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Outputs [N, T, H, D] of the last T = 1..16 of each sequence's `lengths` [N] tokens, which the device knows.

        They see all keys up to their own. The host does not wait, and a CUDA graph can hold it.
        """
        queries = q if self.is_quantised else q.to(self.k.dtype)
        out = decode_attention(queries, self.k, self.v, lengths=lengths, k_scale=self.k_scale, v_scale=self.v_scale)
        return out.to(q.dtype)

    def step_form(self) -> StepShared:
        return StepShared(self)

    def pool_form(self, places: Places) -> PagedKV:
        return PagedKV(self, places)

    def _attend_by_head(self, q: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Many queries over quantised keys: one head at a time, so that only one is ever held in full width."""
        group_size = q.shape[2] // self.k.shape[2]
        stored = [getattr(self, name) for name in ("k", "k_scale", "v", "v_scale")]
        outputs = []
        for head in range(self.k.shape[2]):
            held = [x[:, :, head : head + 1] for x in stored]

            def keys_and_values(group: Group, held: list[torch.Tensor] = held) -> tuple[torch.Tensor, torch.Tensor]:
                k, k_scale, v, v_scale = (x[group.rows, : group.end] for x in held)
                return dequantize_kv(k, k_scale, q.dtype), dequantize_kv(v, v_scale, q.dtype)

            queries = q[:, :, head * group_size : (head + 1) * group_size]
            outputs.append(attend_by_group(queries, batch, keys_and_values))
        return torch.cat(outputs, dim=2)


class StepShared:
    """A SharedKV at one new token a sequence."""

    def __init__(self, held: SharedKV) -> None:
        self.held = held

    def append(self, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> None:
        """Store k, v [N, 1, H_kv, D] at the batch's positions."""
        self.held.store_at(k, v, batch.positions)
        self.lengths = batch.positions[:, 0] + 1  # once for all layers that read

    def attend(self, q: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [N, 1, H, D]."""
        return self.held.attend_at(q, self.lengths)


class FreshShared:
    """Those of this forward pass only, kept in its autograd graph."""

    def append(self, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> None:
        """Hold k, v [B, T, H_kv, D]; the first tokens of their sequences."""
        self.k, self.v, self.batch = k, v, batch
        self.plan: tuple[Batch, tuple[torch.Tensor | None, torch.Tensor, int]] | None = None

    def attend(self, q: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [B, P, H, D] of queries at the batch's positions."""
        if batch.contiguous and batch.cu_seqlens is not None:
            if self.plan is None or self.plan[0] is not batch:  # all layers ask for the same
                self.plan = (batch, self._prefixes(batch))
            index, cu_seqlens_k, longest = self.plan[1]
            k, v = ((x.flatten(0, 1) if index is None else x.flatten(0, 1)[index])[None] for x in (self.k, self.v))
            return global_attention(q, k, v, cu_seqlens=batch.cu_seqlens, cu_seqlens_k=cu_seqlens_k, max_seqlen=longest)
        if self.batch.cu_seqlens is None:
            return attend_by_group(q, batch, lambda group: (self.k[group.rows], self.v[group.rows]))
        places = {group.rows.start: group.where for group in self.batch.groups()}
        return attend_by_group(
            q, batch, lambda group: (self.k[places[group.rows.start]], self.v[places[group.rows.start]])
        )

    def _prefixes(self, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor, int]:
        """Which keys come up to each sequence's last query (None: all), their borders, and the longest's length."""
        ends = [start + length if length else 0 for start, length in zip(batch.starts, batch.lengths, strict=True)]
        device = self.k.device
        index = None
        if tuple(ends) == self.batch.lengths and self.batch.cu_seqlens is not None:
            return None, self.batch.cu_seqlens, max(ends)
        if tuple(ends) != self.batch.lengths:
            firsts = accumulate(self.batch.lengths[:-1], initial=0)
            parts = [torch.arange(first, first + end) for first, end in zip(firsts, ends, strict=True)]
            index = torch.cat(parts).to(device, non_blocking=True)
        return index, borders(ends, device), max(ends)


class ChunkShared:
    """Those of all chunks of a sequence, gathered from the ranks that hold them when they are appended."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def append(self, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> None:
        """Take in k, v [B, T, H_kv, D] of this chunk and, from the other ranks, of all others."""
        heads, T = k.shape[2], k.shape[1]
        everything = all_chunks(torch.cat((k, v), dim=2), 1, self.group)
        self.k, self.v = everything[:, :, :heads], everything[:, :, heads:]
        self.places: list[slice] = []  # of packed sequences: where each one's keys stand, as far as its last query's
        if batch.cu_seqlens is not None:
            before = self.group.rank() * T
            for group in batch.groups():
                first = before + group.where[1].start
                self.places.append(slice(first - group.start, first + group.length))

    def attend(self, q: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [B, P, H, D] of queries at the batch's positions."""
        if q.shape[1] == 0:  # no target in this chunk; its part in the gather's backward remains
            return q + 0.0 * (self.k[:, :0] + self.v[:, :0]).sum()

        def keys_and_values(group: Group) -> tuple[torch.Tensor, torch.Tensor]:
            where = (slice(0, 1), self.places[group.rows.start]) if self.places else group.rows
            return self.k[where], self.v[where]

        return attend_by_group(q, batch, keys_and_values)


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
