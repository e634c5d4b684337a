"""Rows of tokens: a passage of real text that fills the row, with facts hidden in it and questions for them behind.

..... needle ..... needle ..... question, answer ..... | question, answer, question, answer
a passage of the text, cut at its sentences            | the row's end
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from facts import FORMS, Forms, Names, draw_fact
from transformers import PreTrainedTokenizerBase

from oncelm.data.encoding import Encoder

NEAREST = 8  # tokens between a needle and its question, at least
AT_THE_END = 0.25  # of the questions come behind the text, as in the evaluation
LARGEST_SHARE = 0.8  # of a row that is not text, at most
SHORTEST = 128  # tokens of a row: a fact and its question
REACH = 500  # tokens in which the end of a sentence is looked for


@dataclass(frozen=True)
class Insert:
    """Ids that come into the text before its token `place`; those of one place by `order`."""

    place: int
    order: int
    ids: np.ndarray


class Rows:
    """Rows for sequences of `length` tokens, each a function of the seed and its number.

    A row has `length - 1` tokens, its eos included: sequence i of the training begins at token i (length - 1), so that
    each is one whole row and the first token of the next.

    Args:
        haystack: ids of text, [num_tokens]; at least as many as a row.
        tokenizer: of the ids.
        names: for the facts.
        length: T of the training.
        most_facts: in a row; each row draws its number from 1 to this.
        plain_share: of the rows, without any.
        forms: of the facts, beside the needle evaluation's own.
    """

    def __init__(
        self,
        haystack: np.ndarray,
        tokenizer: PreTrainedTokenizerBase,
        names: Names,
        length: int,
        most_facts: int,
        plain_share: float,
        seed: int,
        forms: Forms = FORMS[1:],
    ) -> None:
        if length < SHORTEST:
            raise ValueError(f"rows must have at least {SHORTEST} tokens, got {length}.")
        if len(haystack) < length:
            raise ValueError(
                f"the text has {len(haystack)} tokens, not enough for one row of {length}; give more text."
            )
        self.haystack, self.names, self.length = haystack, names, length
        self.most_facts, self.plain_share, self.seed, self.forms = most_facts, plain_share, seed, forms
        self._encoder, self._eos = Encoder(tokenizer), tokenizer.eos_token_id
        self.vocab_size = self._encoder.vocab_size
        pieces = tokenizer.batch_decode([[i] for i in range(self.vocab_size)])
        self._ends_sentence = np.array([piece.rstrip().endswith((".", "!", "?")) for piece in pieces])

    def row(self, number: int) -> np.ndarray:
        """Ids of row `number`, [length - 1]."""
        random = np.random.default_rng([self.seed, self.length, number])
        if random.random() < self.plain_share:
            return self._plain(random)
        needles, questions = self._facts(LARGEST_SHARE * self.length, random)
        repeated = random.permutation(len(questions))[: random.integers(0, len(questions) // 2 + 1)]
        asked_again = [questions[i] for i in repeated]
        room = self.length - 2 - sum(map(len, [*needles, *questions, *asked_again]))
        text = self._passage(room, random)
        sentence_ends = np.flatnonzero(self._ends_sentence[text]) + 1
        inserts = [Insert(room, 1 + len(questions) + i, ids) for i, ids in enumerate(asked_again)]
        for i, (needle, question) in enumerate(zip(needles, questions, strict=True)):
            distance = round(NEAREST * (room / NEAREST) ** random.random())  # as many of 16 to 32 as of 1K to 2K tokens
            asked = room if random.random() < AT_THE_END else int(random.integers(distance, room + 1))
            inserts.append(Insert(_sentence_end(asked - distance, sentence_ends), 0, needle))
            inserts.append(Insert(asked if asked == room else _sentence_end(asked, sentence_ends), 1 + i, question))
        parts: list[np.ndarray] = []
        at = 0
        for insert in sorted(inserts, key=lambda insert: (insert.place, insert.order)):
            parts += [text[at : insert.place], insert.ids]
            at = insert.place
        return np.concatenate([*parts, text[at:], [self._eos]])

    def _facts(self, room: float, random: np.random.Generator) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The needles and questions of one row, as many as fit `room` tokens with half of the questions asked twice."""
        names = self.names.draw(int(random.integers(1, self.most_facts + 1)), random)
        facts = [draw_fact(name, self.forms, random) for name in names]
        needles = self._encode([fact.needle for fact in facts])
        questions = self._encode([fact.question for fact in facts])
        lengths = [len(n) + 1.5 * len(q) for n, q in zip(needles, questions, strict=True)]
        count = int(np.searchsorted(np.cumsum(lengths), room, side="right"))
        return needles[:count], questions[:count]

    def _plain(self, random: np.random.Generator) -> np.ndarray:
        return np.append(self._passage(self.length - 2, random), self._eos)

    def _passage(self, count: int, random: np.random.Generator) -> np.ndarray:
        start = int(random.integers(0, len(self.haystack) - count + 1))
        return self.haystack[start : start + count]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        return [np.array(ids, dtype=np.int64) for ids in self._encoder.encode(texts)]


def _sentence_end(place: int, ends: np.ndarray) -> int:
    """The last sentence end at or before `place`, or `place` itself where there is none near."""
    i = int(np.searchsorted(ends, place, side="right")) - 1
    return int(ends[i]) if i >= 0 and place - ends[i] <= REACH else place
