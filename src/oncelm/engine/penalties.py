"""Penalties for tokens that a text already has, from counts that are kept from token to token."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import torch

from oncelm.engine.places import SamplingRow
from oncelm.utils.device import send


class Penalties:
    """Repetition, frequency and presence penalties of many answers at once.

    One table holds what each answer has: a new token is added to its row, the prompt is read once. Drafts are counted
    for their place only. An answer's row is free again when its `Memo` is gone.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._in_prompt = torch.zeros(0, vocab_size, dtype=torch.bool, device=device)
        self._in_output = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._free: list[int] = []

    def apply(self, logits: torch.Tensor, rows: Sequence[SamplingRow]) -> torch.Tensor:
        """Logits [m, V] float32 of rows, changed as their parameters ask."""
        self._count(rows)
        places = send([row.memo.counts for row in rows], torch.long, self._device)
        in_prompt, in_output = self._in_prompt[places], self._in_output[places]
        self._add(in_output, [(i, token) for i, row in enumerate(rows) for token in row.drafts])
        asked = [(p.repetition_penalty, p.frequency_penalty, p.presence_penalty) for p in (row.params for row in rows)]
        repetition, frequency, presence = send(asked, torch.float32, self._device).unsqueeze(1).unbind(2)
        written = in_output > 0
        repeated = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(in_prompt | written, repeated, logits)
        return logits - frequency * in_output - presence * written

    def _count(self, rows: Sequence[SamplingRow]) -> None:
        """Give each answer a row, with all tokens that are sure."""
        new: list[tuple[int, int]] = []
        for row in rows:
            memo = row.memo
            if memo.counts is None:
                memo.counts = self._take(row)
                weakref.finalize(memo, self._free.append, memo.counts)
            new += ((memo.counts, token) for token in row.output[memo.counted : row.num_sure])
            memo.counted = max(memo.counted, row.num_sure)
        self._add(self._in_output, new)

    def _add(self, counts: torch.Tensor, tokens: list[tuple[int, int]]) -> None:
        """Count pairs of a row and a token."""
        if tokens:
            places = send(tokens, torch.long, self._device).unbind(1)
            counts.index_put_(places, torch.ones_like(places[0], dtype=counts.dtype), accumulate=True)

    def _take(self, row: SamplingRow) -> int:
        """A free row of the table, with the prompt's tokens where they count."""
        if not self._free:
            size = len(self._in_output)
            self._free += reversed(range(size, 2 * size or 8))
            self._in_prompt, self._in_output = (
                torch.cat((table, table.new_zeros(len(self._free), table.shape[1])))
                for table in (self._in_prompt, self._in_output)
            )
        taken = self._free.pop()
        self._in_prompt[taken] = False
        self._in_output[taken] = 0
        if row.params.repetition_penalty != 1:
            # index_fill_, for an assignment would bring the value to the device, and wait
            self._in_prompt[taken].index_fill_(0, send(list(set(row.prompt)), torch.long, self._device), True)
        return taken
