"""Keys and values of a memory in blocks: on the model's device, in CPU memory or in a file.

A block is allocated when the one before it is full, and nothing is ever moved or concatenated. Attention streams the
blocks one by one to the model's device and keeps a running softmax: the result is exact whatever the blocks, and the
device holds one block at a time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from oncelm.ops.attention.grouping import attention_groups
from oncelm.ops.attention.partial import join_attention, partial_attention
from oncelm.ops.quantize import dequantize_kv, quantize_kv

BLOCK_TOKENS = 8192


class Block:
    """k, v [N, H_kv, S, D] of S tokens a sequence; for int8 with a scale a token and head [N, H_kv, S]."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, place: torch.device | Path) -> None:
        self.k, self.v = (_allocate(shape, dtype, place) for _ in "kv")
        if dtype == torch.int8:
            self.k_scale, self.v_scale = (_allocate(shape[:-1], torch.float32, place) for _ in "kv")

    def tensors(self) -> list[torch.Tensor]:
        return list(vars(self).values())

    def write(self, rows: slice, span: slice, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k, v [n, t, H_kv, D]."""
        for name, x in (("k", k), ("v", v)):
            target, x = getattr(self, name), x.transpose(1, 2)
            if target.dtype == torch.int8:
                x, scales = quantize_kv(x, torch.int8)
                getattr(self, f"{name}_scale")[rows, :, span] = scales.to(target.device)
            target[rows, :, span] = x.to(target.device, target.dtype)

    def read(self, name: str, rows: slice, stop: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """[n, stop, H_kv, D] on a device in a dtype."""
        ahead = device.type == "cuda"  # a GPU's own stream waits for the copy; a copy to the CPU would be read too soon
        x = getattr(self, name)[rows, :, :stop].to(device, non_blocking=ahead)
        if x.dtype != torch.int8:
            return x.to(dtype).transpose(1, 2)
        scales = getattr(self, f"{name}_scale")[rows, :, :stop].to(device, non_blocking=ahead)
        return dequantize_kv(x, scales, dtype).transpose(1, 2)


class MemoryBlocks:
    """A memory for N sequences in blocks of `block_tokens` tokens.

    Args:
        place: a device, or an existing folder for files (which vanish with the memory).
        dtype: of storage; torch.int8 quantises each token of each head by its largest value.
    """

    def __init__(
        self,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        place: torch.device | Path,
        block_tokens: int = BLOCK_TOKENS,
        grouping: tuple[int, int] | None = None,
    ) -> None:
        self.shape = (batch_size, num_kv_heads, block_tokens, head_dim)
        self.dtype, self.place, self.grouping = dtype, place, grouping
        self.blocks: list[Block] = []

    def append(self, rows: slice, k: torch.Tensor, v: torch.Tensor, at: int) -> None:
        """Remember k, v [n, t, H_kv, D] of sequences `rows`, which hold `at` tokens already."""
        size, done = self.shape[2], 0
        while done < k.shape[1]:
            number, first = divmod(at + done, size)
            if number == len(self.blocks):
                self.blocks.append(Block(self.shape, self.dtype, self.place))
            count = min(size - first, k.shape[1] - done)
            part = slice(done, done + count)
            self.blocks[number].write(rows, slice(first, first + count), k[:, part], v[:, part])
            done += count

    def attend(self, q: torch.Tensor, rows: slice, held: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(o [n, T, H, D], lse [n, T, H]) of q [n, T, H, D] over the first `held` >= 1 tokens of sequences `rows`."""
        groups = list(attention_groups(q, self.shape[1], self.grouping))
        wide = torch.promote_types(q.dtype, torch.float32)
        o = torch.empty(q.shape, dtype=wide, device=q.device)
        lse = torch.empty(q.shape[:3], dtype=wide, device=q.device)
        for number, (k, v) in enumerate(self._stream(rows, held, q.device, wide)):
            for at, heads, kv in groups:
                part = partial_attention(q[:, at, heads], k[:, :, kv], v[:, :, kv])
                if number:
                    part = join_attention((o[:, at, heads], lse[:, at, heads]), part)
                o[:, at, heads], lse[:, at, heads] = part
        return o, lse

    def _stream(
        self, rows: slice, held: int, device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for number, block in enumerate(self.blocks):
            stop = min(self.shape[2], held - number * self.shape[2])
            if stop <= 0:
                return
            yield tuple(block.read(name, rows, stop, device, dtype) for name in "kv")  # type: ignore[misc]

    def contents(self, rows: slice, held: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """k, v [n, s, H_kv, D] of the first `held` tokens, block by block, on the CPU; int8 as float32."""
        dtype = torch.float32 if self.dtype == torch.int8 else self.dtype
        yield from self._stream(rows, held, torch.device("cpu"), dtype)

    def keep_rows(self, index: torch.Tensor, remembered: tuple[int, ...]) -> None:
        """Keep sequences `index` [M], in that order; one block at a time is copied."""
        self.shape = (len(index), *self.shape[1:])
        for number, old in enumerate(self.blocks):
            self.blocks[number] = new = Block(self.shape, self.dtype, self.place)
            for target, source in zip(new.tensors(), old.tensors(), strict=True):
                torch.index_select(source, 0, index.to(source.device), out=target)

    def nbytes(self) -> int:
        """Bytes allocated, wherever they are."""
        return sum(tensor.nbytes for block in self.blocks for tensor in block.tensors())


def _allocate(shape: tuple[int, ...], dtype: torch.dtype, place: torch.device | Path) -> torch.Tensor:
    if isinstance(place, Path):
        return _in_file(shape, dtype, place)
    pinned = place.type == "cpu" and torch.cuda.is_available()  # pinned memory streams to a GPU at full speed
    return torch.empty(shape, dtype=dtype, device=place, pin_memory=pinned)


def _in_file(shape: tuple[int, ...], dtype: torch.dtype, folder: Path) -> torch.Tensor:
    """A tensor whose memory is a file without a name: it goes when the tensor goes, or the process."""
    size = torch.Size(shape).numel()
    try:
        descriptor, name = tempfile.mkstemp(dir=folder, prefix="oncelm-memory-")
        os.unlink(name)  # before it takes room, which a kill would leave taken
    except OSError as error:
        raise OSError(f"memory 'disk' cannot make a file in {folder}: {error.strerror}") from error
    try:
        # the space is taken now: on a full disk a write through the mapping would end the process
        os.posix_fallocate(descriptor, 0, size * dtype.itemsize)
        return torch.from_file(f"/proc/self/fd/{descriptor}", shared=True, size=size, dtype=dtype).view(shape)
    except OSError as error:
        needed = size * dtype.itemsize / 2**20
        raise OSError(f"no room for a block of memory ({needed:,.1f} MiB) in {folder}: {error}") from error
    finally:
        os.close(descriptor)
