"""What one step of the engine does, as the scheduler plans it and the runner executes it.

A request at position n has the shared keys and values of its first n tokens in pages, and the states of the
self-decoder after exactly n tokens in its slot. A step is two forward passes over requests: first *pieces* of prompts
move n on, through the self-decoder alone; then *rows* read the last tokens of requests whose prompts are read, and
give logits. What a row appends counts from its first `kept` tokens only: the others are drafts, whose states are never
stored, and whose keys and values are written over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

UNREAD = -1  # in place of a token: the one that was chosen last in this slot, which only the device knows so far


@dataclass(slots=True)
class Piece:
    """Tokens of a prompt to read.

    Attributes:
        slot: of the request's states.
        pages: of its shared keys and values, in order; they have room for start + len(tokens).
        start: n, the position of the first token.
        tokens: at positions start, start + 1, ...; all count.
        wanted: hidden states of all of them are wanted, for log-probabilities of the prompt.
    """

    slot: int
    pages: Sequence[int]
    start: int
    tokens: Sequence[int]
    wanted: bool = False


@dataclass(slots=True)
class Row:
    """The last tokens of a request: those that count, and drafts of what may follow.

    Logits are wanted at the last token that counts, and at each draft. A single token may be `UNREAD`.
    """

    slot: int
    pages: Sequence[int]
    start: int
    tokens: Sequence[int]
    kept: int = 1

    @property
    def num_logits(self) -> int:
        return len(self.tokens) - self.kept + 1
