"""Playing a conversation: its prompts, each from all that was said so far, and what became of them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from oncelm.bench.serve.workload import Conversation, Turn
from oncelm.engine.outputs import RequestMetrics


@dataclass
class Answer:
    """What became of a turn.

    Attributes:
        conversation, turn: which, from 0.
        times: when; of a stream from an address, a token time may stand for several tokens.
        num_cached_tokens: of the prompt; None: not told.
        error: why there is no whole answer; None: there is.
    """

    conversation: int
    turn: int
    times: RequestMetrics
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_cached_tokens: int | None = None
    error: str | None = None


class Player:
    """One conversation as it goes on.

    A text of so many tokens is random ids below `vocab_size`, from the seed. Shared texts of one name begin alike,
    whatever their lengths.

    Attributes:
        turn: the number of the next turn, or of the one that is being answered.
    """

    def __init__(self, number: int, conversation: Conversation, vocab_size: int, seed: int) -> None:
        self.number, self.conversation = number, conversation
        self.vocab_size, self.seed = vocab_size, seed
        self.turn = 0
        self._text, self._ids = "", list[int]()

    def next_turn(self) -> Turn | None:
        """None: all is said."""
        turns = self.conversation.turns
        return turns[self.turn] if self.turn < len(turns) else None

    @property
    def turns_left(self) -> int:
        return len(self.conversation.turns) - self.turn

    def prompt(self) -> list[int] | str:
        """Of the next turn; may be asked for once."""
        conversation = self.conversation
        said = conversation.turns[self.turn].input
        if isinstance(said, str):
            self._text += said
            return self._text
        if self.turn == 0 and conversation.prefix is not None:
            self._ids += self._made_up(conversation.prefix, conversation.prefix_length)
        self._ids += self._made_up(f"input {self.number} {self.turn}", said)
        return list(self._ids)

    def answered(self, text: str, token_ids: Sequence[int] | None, num_tokens: int) -> None:
        """Go on behind this answer; where its tokens are not told, behind others, as many."""
        if self.conversation.is_text:
            self._text += text
        elif token_ids is None:
            self._ids += self._made_up(f"output {self.number} {self.turn}", num_tokens)
        else:
            self._ids += token_ids
        self.turn += 1

    def _made_up(self, name: str, length: int) -> list[int]:
        rng = np.random.default_rng((self.seed, zlib.crc32(name.encode())))
        first = min(3, self.vocab_size - 1)  # those before are often special
        return rng.integers(first, self.vocab_size, length).tolist()


class Progress:
    """A bar over all turns, with the tokens written so far."""

    def __init__(self, conversations: Sequence[Conversation], name: str) -> None:
        turns = sum(len(conversation.turns) for conversation in conversations)
        self._bar = tqdm(total=turns, desc=name, unit="request", dynamic_ncols=True)
        self._tokens = self._failed = 0

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def add(self, answer: Answer, turns: int = 1) -> None:
        """An answer is there; `turns` above 1: with it, all those that would have followed."""
        self._tokens += answer.num_output_tokens
        self._failed += answer.error is not None
        failed = {"failed": self._failed} if self._failed else {}
        self._bar.set_postfix({"output tokens": f"{self._tokens:,}", **failed}, refresh=False)
        self._bar.update(turns)
