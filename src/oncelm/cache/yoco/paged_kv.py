"""Keys and values of all tokens, in the pages of a pool: a SharedKV of which each "sequence" is a page."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from oncelm.cache.batch import Batch, borders
from oncelm.cache.yoco.places import Places
from oncelm.ops import decode_attention, dequantize_kv, global_attention
from oncelm.ops.attention import MOST_DECODED, has_decode_kernel
from oncelm.ops.quantize import as_bytes
from oncelm.utils.device import to_device

if TYPE_CHECKING:
    from oncelm.cache.yoco.shared_kv import SharedKV

Pair = tuple[torch.Tensor, torch.Tensor]

MOST_GATHERED = 1 << 28  # bytes of keys and values that are brought together at once, on a CPU 4 times as many


class PagedKV:
    """Pages of keys and values, for the sequences of one pass."""

    def __init__(self, held: SharedKV, places: Places) -> None:
        self.held, self.places = held, places
        self._rows: tuple[Batch, tuple[torch.Tensor, torch.Tensor | None]] | None = None

    def append(self, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> None:
        """Store k, v [B, T, H_kv, D] of the batch's tokens in the pages of their sequences."""
        self.held.store(self.places.rows(batch, self.held.capacity), k, v)

    def attend(self, q: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Outputs [B, P, H, D] of the last tokens of each sequence (of some none); their keys have been appended.

        A kernel reads the pages where they are. Without one, or of more tokens than it takes, keys and values are
        brought together once a pass, and all layers read those; of very many, a head at a time in each layer.
        """
        queries = q if self.held.is_quantised else q.to(self.held.k.dtype)
        longest = max(batch.lengths)
        if not batch.starts or (longest <= MOST_DECODED and has_decode_kernel(q, self.held.k, longest)):
            return self._decode(queries, batch, longest).to(q.dtype)
        ends = tuple(start + length if length else 0 for start, length in zip(batch.starts, batch.lengths, strict=True))
        heads = self.held.k.shape[2]
        most = MOST_GATHERED * (4 if q.device.type == "cpu" else 1)
        if 2 * sum(ends) * heads * q.shape[3] * queries.element_size() <= most:
            key = (self.held, ends, q.dtype)
            if self.places.gathered is None or self.places.gathered[0] != key:
                self.places.gathered = None  # one store's at a time
                self.places.gathered = key, self._gather(ends, slice(None), queries.dtype)
            return self._attend(queries, batch, ends, self.places.gathered[1]).to(q.dtype)
        group = q.shape[2] // heads
        outputs = []
        for head in range(heads):
            found = self._gather(ends, slice(head, head + 1), queries.dtype)
            outputs.append(self._attend(queries[:, :, head * group : (head + 1) * group], batch, ends, found))
        return torch.cat(outputs, dim=2).to(q.dtype)

    def _decode(self, q: torch.Tensor, batch: Batch, longest: int) -> torch.Tensor:
        """A few tokens a sequence, by `decode_attention`. Waits for nothing where the batch is dense."""
        held, N = self.held, len(self.places.slots)
        if self._rows is None or self._rows[0] is not batch:  # once for all layers that read
            self._rows = batch, self._lengths_and_places(batch, longest)
        lengths, where = self._rows[1]
        if where is not None:
            q = q.new_zeros(N * longest, *q.shape[2:]).index_copy_(0, where, q[0]).unflatten(0, (N, longest))
        o = decode_attention(
            q, held.k, held.v, lengths=lengths, block_tables=self.places.block_tables,
            k_scale=held.k_scale, v_scale=held.v_scale,
        )  # fmt: skip
        return o if where is None else o.flatten(0, 1)[where][None]

    def _lengths_and_places(self, batch: Batch, longest: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[N] tokens of each sequence up to the batch's last one; of a packed batch also where its tokens [total] go in
        rows of `longest`, each sequence's to the end of its own."""
        if batch.cu_seqlens is None:
            return (batch.positions[:, -1] + 1).expand(len(self.places.slots)), None
        ends = [start + length for start, length in zip(batch.starts, batch.lengths, strict=True)]
        places = [n * longest + t for n, count in enumerate(batch.lengths) for t in range(longest - count, longest)]
        return to_device(torch.tensor(ends), batch.positions.device), to_device(
            torch.tensor(places), batch.positions.device
        )

    def _gather(self, ends: tuple[int, ...], heads: slice, dtype: torch.dtype) -> list[Pair]:
        """Keys and values of each sequence's first `ends` tokens, [1, S, heads, D] of `dtype`.

        On a GPU those of all sequences stand side by side, in one pair.
        """
        held, size = self.held, self.held.capacity
        names = held.tensor_names
        if held.k.device.type == "cpu":
            return [
                _widened([_joined(getattr(held, name)[:, :, heads], pages, end) for name in names], dtype)
                for pages, end in zip(self._pages(ends), ends, strict=True)
            ]
        positions = torch.cat([torch.arange(end, device=held.k.device) for end in ends])
        sequence = torch.cat([torch.full((end,), n, device=held.k.device) for n, end in enumerate(ends)])
        pages = self.places.block_tables[sequence, positions // size].long()
        rows = positions % size
        stored = (getattr(held, name)[:, :, heads] for name in names)
        return [_widened([as_bytes(x)[pages, rows].view(x.dtype)[None] for x in stored], dtype)]

    def _pages(self, ends: tuple[int, ...]) -> list[list[int]]:
        size = self.held.capacity
        return [table[: -(-end // size)].tolist() for table, end in zip(self.places.block_tables, ends, strict=True)]

    def _attend(self, q: torch.Tensor, batch: Batch, ends: tuple[int, ...], gathered: list[Pair]) -> torch.Tensor:
        if q.device.type != "cpu":
            ((k, v),) = gathered
            N, T = q.shape[:2]
            queries, counts = q.flatten(0, 1)[None], batch.lengths
            cu_seqlens = batch.cu_seqlens if batch.cu_seqlens is not None else borders(counts, q.device)
            o = global_attention(
                queries, k, v, cu_seqlens=cu_seqlens, cu_seqlens_k=borders(ends, q.device), max_seqlen=max(ends)
            )
            return o[0].unflatten(0, (N, T))
        outputs = []
        firsts = accumulate(batch.lengths, initial=0)
        for n, (first, length, (k, v)) in enumerate(zip(firsts, batch.lengths, gathered, strict=False)):
            queries = q[n : n + 1] if batch.cu_seqlens is None else q[:, first : first + length]
            if length:
                outputs.append(global_attention(queries, k, v))
        return batch.join(outputs)


def _joined(x: torch.Tensor, pages: list[int], end: int) -> torch.Tensor:
    """The first `end` rows in `pages` of x [num_pages, page_size, H, ...]: [1, end, H, ...], head by head in memory.

    A view where they lie in one page.
    """
    if len(pages) == 1:
        return x[pages[0], None, :end]
    by_head = as_bytes(x).transpose(1, 2)
    joined = torch.cat([by_head[page] for page in pages] or [by_head[0, :, :0]], dim=1)
    return joined[None, :, :end].transpose(1, 2).view(x.dtype)


def _widened(stored: list[torch.Tensor], dtype: torch.dtype) -> Pair:
    """Keys and values as numbers of `dtype`, of what a SharedKV stores of them."""
    if len(stored) == 2:
        return stored[0].to(dtype), stored[1].to(dtype)
    k, v, k_scale, v_scale = stored
    return dequantize_kv(k, k_scale, dtype), dequantize_kv(v, v_scale, dtype)
