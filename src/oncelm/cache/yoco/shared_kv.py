"""The one global key/value cache that every layer of the cross-decoder reads."""

from __future__ import annotations

from collections.abc import Callable

import torch

from oncelm.cache.batch import Batch, Group
from oncelm.cache.rows import Rows
from oncelm.ops import decode_attention, dequantize_kv, global_attention, quantize_kv
from oncelm.ops.attention import MOST_DECODED, has_decode_kernel
from oncelm.ops.quantize import LARGEST, as_bytes

# what a cache can store keys and values in: floats, or 8 bits with a scale a vector
STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, *LARGEST)


class SharedKV(Rows):
    """k, v [N, S, H_kv, D] for N sequences of up to S tokens, keys already rotated.

    Tokens are written where `batch.positions` says and never moved.

    k and v of float8_e4m3fn or int8 are quantised as they come, with k_scale, v_scale [N, S, H_kv] in float32.
    """

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
            self._store((group.rows, span), k[group.where], v[group.where])

    def store_at(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> None:
        """The same for T tokens of each of the N sequences at positions [N, T], which only the device knows.

        The host does not wait, and a CUDA graph can hold it. Room must have been reserved.
        """
        rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
        self._store((rows, positions), k, v)

    def _store(self, where: tuple, k: torch.Tensor, v: torch.Tensor) -> None:
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
        """Outputs [N, T, H, D] of the last T = 1..8 of each sequence's `lengths` [N] tokens, which the device knows.

        They see all keys up to their own. The host does not wait, and a CUDA graph can hold it.
        """
        queries = q if self.is_quantised else q.to(self.k.dtype)
        out = decode_attention(queries, self.k, self.v, lengths=lengths, k_scale=self.k_scale, v_scale=self.v_scale)
        return out.to(q.dtype)

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
