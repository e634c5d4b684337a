"""The tokens of a forward pass: of which sequences they are, and at which positions.

Two layouts serve every use. *Dense*: x is [N, T, ...], N sequences with T new tokens each. *Packed*: x is
[1, total, ...], the new tokens of N sequences side by side, `cu_seqlens` marking the borders; a padded batch is packed
before it is computed, so padding costs nothing and cannot leak.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from oncelm.utils.device import to_device

HISTORY = 64  # forward passes that a recording cache can undo


@dataclass(frozen=True)
class Group:
    """Sequences of a batch that can be computed together: one cache length, one number of tokens."""

    rows: slice  # which sequences, as rows of a cache
    where: tuple[slice, slice]  # where their tokens stand in x [B, T, ...]
    start: int  # tokens that each of them has in the cache already
    length: int  # tokens of each in this batch
    end: int  # tokens of each once the whole forward pass is in the cache


@dataclass(frozen=True)
class Batch:
    """N sequences and their tokens in one forward pass.

    Attributes:
        starts: N counts of tokens that came before, already in a cache.
        lengths: N counts of tokens in this batch.
        ends: N counts of tokens that a cache holds after this forward pass.
        positions: [N or 1, T] (dense) or [1, total] (packed) position of each token in its own sequence.
        cu_seqlens: [N + 1] borders of packed sequences; None for a dense batch.
        contiguous: each sequence's tokens stand side by side from its start on; False after picking some of them.
    """

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    ends: tuple[int, ...]
    positions: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    contiguous: bool = True

    @classmethod
    def dense(cls, starts: tuple[int, ...], length: int, device: torch.device) -> Batch:
        """N sequences of `length` new tokens each."""
        if len(set(starts)) == 1:
            positions = torch.arange(starts[0], starts[0] + length, device=device)[None]
        else:
            firsts = to_device(torch.tensor(starts), device)
            positions = firsts[:, None] + torch.arange(length, device=device)
        return cls(starts, (length,) * len(starts), tuple(start + length for start in starts), positions)

    @classmethod
    def packed(cls, starts: tuple[int, ...], lengths: tuple[int, ...], device: torch.device) -> Batch:
        """N sequences of any lengths (zero too) side by side."""
        parts = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        positions = to_device(torch.cat(parts), device)[None]
        ends = tuple(start + length for start, length in zip(starts, lengths, strict=True))
        return cls(starts, lengths, ends, positions, borders(lengths, device))

    @classmethod
    def step(cls, positions: torch.Tensor) -> Batch:
        """T new tokens of each of N sequences at positions [N, T]; how long they are is known on the device only."""
        return cls((), (positions.shape[1],) * len(positions), (), positions)

    @property
    def num_sequences(self) -> int:
        return len(self.lengths)

    @cached_property
    def is_uniform(self) -> bool:
        """Dense, and every sequence starts at the same position."""
        return self.cu_seqlens is None and len(set(self.starts)) == 1

    def groups(self) -> Iterator[Group]:
        """The groups to compute one after the other: a single one for a uniform batch, else one a sequence."""
        if self.is_uniform:
            everything = slice(0, self.num_sequences)
            yield Group(everything, (everything, slice(None)), self.starts[0], self.lengths[0], self.ends[0])
            return
        borders = [0, *accumulate(self.lengths)]
        for n, (start, length, end) in enumerate(zip(self.starts, self.lengths, self.ends, strict=True)):
            row = slice(n, n + 1)
            tokens = slice(None) if self.cu_seqlens is None else slice(borders[n], borders[n + 1])
            yield Group(row, (row if self.cu_seqlens is None else slice(0, 1), tokens), start, length, end)

    def join(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """The groups' outputs [b, t, ...] in this batch's layout."""
        if len(outputs) == 1:
            return outputs[0]
        return torch.cat(outputs, dim=0 if self.cu_seqlens is None else 1)

    def columns(self, index: slice | torch.Tensor) -> Selection:
        """The same columns of every sequence of a dense batch; the result is dense."""
        assert self.cu_seqlens is None, "columns of a packed batch"
        T = self.lengths[0]
        positions = self.positions[:, index]
        if isinstance(index, slice):
            first, stop, _ = index.indices(T)
            starts = tuple(start + first for start in self.starts)
            batch = Batch(starts, (stop - first,) * self.num_sequences, self.ends, positions)
        else:
            lengths = (index.numel(),) * self.num_sequences
            batch = Batch(self.starts, lengths, self.ends, positions, contiguous=False)
        return Selection(batch, columns=index)

    def pick(self, mask: torch.Tensor) -> Selection:
        """Any tokens: mask is boolean, [N, T] (dense) or [1, total] (packed); the result is packed.

        It is contiguous where the tokens picked of each sequence stand side by side, as all but the last do, or the
        answer to a prompt. A mask on the CPU is read there: nothing waits for a GPU that the tokens are on.
        """
        assert self.contiguous, "picked from tokens that were picked"
        device = self.positions.device
        flat = mask.flatten().nonzero().squeeze(1)
        firsts = [0, *accumulate(self.lengths)]  # where each sequence begins in the flattened mask
        below = torch.cat((mask.new_zeros(1, dtype=torch.long), mask.flatten().cumsum(0)))
        lengths = tuple(below[borders(self.lengths, mask.device).long()].diff().tolist())
        starts, contiguous = self._runs(flat, firsts, lengths)
        flat = to_device(flat, device)
        positions = self.positions.expand(mask.shape).flatten()[flat][None]
        return Selection(Batch(starts, lengths, self.ends, positions, borders(lengths, device), contiguous), flat=flat)

    def _runs(self, flat: torch.Tensor, firsts: list[int], lengths: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
        """Positions at which the tokens `flat`, `lengths` of each sequence, start, and whether they stand side by side.

        firsts: where each sequence begins in what `flat` counts.
        """
        some = [n for n, length in enumerate(lengths) if length]
        bounds = [0, *accumulate(lengths)]
        outer = torch.tensor([[bounds[n], bounds[n + 1] - 1] for n in some], dtype=torch.long).view(-1, 2)
        starts = list(self.starts)
        for n, (first, last) in zip(some, flat[outer.to(flat.device)].tolist(), strict=True):
            if last - first + 1 != lengths[n]:
                return self.starts, False
            starts[n] += first - firsts[n]
        return tuple(starts), True


@dataclass(frozen=True)
class Selection:
    """Some tokens of a batch: the batch that they form, and how to take their rows out of x."""

    batch: Batch
    columns: slice | torch.Tensor | None = None
    flat: torch.Tensor | None = None

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, ...] -> [B, P, ...] (columns) or [1, count, ...] (picked)."""
        if self.flat is not None:
            return x.flatten(0, 1)[self.flat][None]
        return x[:, self.columns]


def borders(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """cu_seqlens [N + 1] of packed sequences."""
    return to_device(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)
