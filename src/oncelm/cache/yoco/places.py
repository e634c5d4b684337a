"""Where the sequences of one forward pass have their past in a pool: in slots and in pages."""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch

from oncelm.cache.batch import Batch, borders
from oncelm.ops.attention import PAGE_SIZES
from oncelm.utils.device import to_device


class Part(NamedTuple):
    """Some tokens of a packed batch, as a packed batch of their own.

    Attributes:
        tokens: [t] where they stand in the batch.
        cu_seqlens: [n + 1] borders of their sequences.
        slots: [n] of these sequences.
    """

    tokens: torch.Tensor
    cu_seqlens: torch.Tensor
    slots: torch.Tensor


class Ring(NamedTuple):
    """Windows in slots, read as pages.

    Attributes:
        places: [N] of the new tokens in their rings.
        lengths: [N] tokens that each ring then holds.
        block_size: of these pages; 0 where none divides the window.
        block_tables: [N, W / block_size] the pages of each slot's ring; None where none divides the window.
    """

    places: torch.Tensor
    lengths: torch.Tensor
    block_size: int
    block_tables: torch.Tensor | None


class Drafted(NamedTuple):
    """A few tokens a sequence, the last of them drafts, and windows in slots.

    Attributes:
        sees: [N, T, W + T] whether a token sees what is in the ring, as it lies there, and what is new.
        slots: [N, T] in which each token's keys go: scratch, where it does not count.
        places: [N, T] in the ring.
    """

    sees: torch.Tensor
    slots: torch.Tensor
    places: torch.Tensor


class Places:
    """The slots and pages of N sequences, for one forward pass.

    Args:
        slots: [N] int64, where the states and windows of each are. All different, but for slot 0, which is scratch.
        block_tables: [N, max_blocks] int32, the pages of each in order; entries behind its last one are not read.
        kept: how many of its tokens in this pass count, of each; those behind are drafts, which see what came before
            but leave no trace in a slot. A tensor [N] in a dense pass of a few tokens each, whose batch is a
            `Batch.step`; else numbers. None: all count.

    Attributes:
        gathered: keys and values that one store has brought together for its readers, and what tells them from others.
    """

    def __init__(
        self, slots: torch.Tensor, block_tables: torch.Tensor, kept: tuple[int, ...] | torch.Tensor | None = None
    ) -> None:
        self.slots, self.block_tables, self.kept = slots, block_tables, kept
        self.gathered: tuple[tuple, list[tuple[torch.Tensor, torch.Tensor]]] | None = None
        self._rows: tuple[Batch, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._ring: tuple[Batch, int, Ring] | None = None
        self._drafted: tuple[Batch, int, Drafted] | None = None
        self._parts: tuple[Batch, tuple[Part, Part, torch.Tensor]] | None = None

    @cached_property
    def slot_numbers(self) -> list[int]:
        """The slots, read by the host: for a CPU."""
        return self.slots.tolist()

    def rows(self, batch: Batch, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The page of each token of the batch, and the row in it: both [N, T] or [1, total]."""
        if self._rows is None or self._rows[0] is not batch:  # all layers ask for the same
            positions = batch.positions
            # drafts that only fill up a row may stand behind the last page that a table has room for
            blocks = (positions // page_size).clamp(max=self.block_tables.shape[1] - 1)
            if batch.cu_seqlens is None:
                N = len(self.slots)
                pages = self.block_tables.gather(1, blocks.expand(N, -1))
                positions = positions.expand(N, -1)
            else:
                tokens = torch.arange(positions.shape[1], device=positions.device, dtype=batch.cu_seqlens.dtype)
                sequence = torch.searchsorted(batch.cu_seqlens[1:].contiguous(), tokens, right=True)
                pages = self.block_tables[sequence, blocks[0]][None]
            self._rows = batch, (pages.long(), positions % page_size)
        return self._rows[1]

    def ring(self, batch: Batch, window_size: int) -> Ring:
        """Where one new token a sequence goes in rings of `window_size` tokens, which stand in the slots."""
        if self._ring is None or self._ring[0] is not batch or self._ring[1] != window_size:
            position = batch.positions[:, 0].expand(len(self.slots))
            block = next((size for size in PAGE_SIZES if window_size % size == 0), 0)
            tables = None
            if block:
                count = window_size // block
                tables = self.slots[:, None] * count + torch.arange(count, device=self.slots.device)
            lengths = (position + 1).clamp(max=window_size)
            self._ring = batch, window_size, Ring(position % window_size, lengths, block, tables)
        return self._ring[2]

    def drafted(self, batch: Batch, window_size: int) -> Drafted:
        """How a few tokens a sequence, of which `kept` go into rings of `window_size` tokens, see these rings."""
        if self._drafted is None or self._drafted[0] is not batch or self._drafted[1] != window_size:
            assert isinstance(self.kept, torch.Tensor)
            start, T, device = batch.positions[:, :1], batch.positions.shape[1], self.slots.device
            new, ring = torch.arange(T, device=device), torch.arange(window_size, device=device)
            held = start - 1 - (start - 1 - ring) % window_size  # [N, W] positions that the rings hold
            in_ring = ((held >= 0) & (held > start - window_size))[:, None]
            in_ring = in_ring & (held[:, None] > batch.positions[:, :, None] - window_size)
            age = new[:, None] - new
            in_row = ((age >= 0) & (age < window_size)).expand(len(start), T, T)
            kept = self.kept[:, None]
            slots = torch.where((new < kept) & (new >= kept - window_size), self.slots[:, None], 0)
            found = Drafted(torch.cat((in_ring, in_row), dim=2), slots, batch.positions % window_size)
            self._drafted = batch, window_size, found
        return self._drafted[2]

    def parts(self, batch: Batch) -> tuple[Part, Part, torch.Tensor]:
        """The tokens of a packed batch that count, the drafts behind them, and where each token [total] is in both."""
        assert isinstance(self.kept, tuple)
        if self._parts is None or self._parts[0] is not batch:
            self._parts = batch, self._cut(batch.lengths, self.kept)
        return self._parts[1]

    def _cut(self, lengths: tuple[int, ...], kept: tuple[int, ...]) -> tuple[Part, Part, torch.Tensor]:
        device, firsts = self.slots.device, list(accumulate(lengths, initial=0))
        drafted = [n for n, (count, length) in enumerate(zip(kept, lengths, strict=True)) if count < length]
        spans = [(firsts[n], firsts[n] + count) for n, count in enumerate(kept)]
        spans += [(firsts[n] + kept[n], firsts[n + 1]) for n in drafted]
        order = torch.tensor([token for span in spans for token in range(*span)])
        tokens, back = to_device(order, device), to_device(order.argsort(), device)
        rows = to_device(torch.tensor(drafted, dtype=torch.long), device)
        counted = Part(tokens[: sum(kept)], borders(kept, device), self.slots)
        left = borders([lengths[n] - kept[n] for n in drafted], device)
        return counted, Part(tokens[sum(kept) :], left, self.slots[rows]), back
