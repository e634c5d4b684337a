"""Drills: rows of random tokens in which facts, keys and values, are told again and again, each time in another order.

    k k k . v v   k k k . v v v v   | k k k . v v v v   k k k . v v   | ...
    first round: nobody can know    | later: behind a key comes what came behind it before

To find the fact whose key was just read is all that needles need. The fewer facts there are to choose from, the sooner
it is learned: hence rows of 2, then 8, then 32. That most of a row can be known makes it sooner too.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedTokenizerBase

from oncelm.data.encoding import Encoder

TOKENS_A_FACT = 32  # of the row: three to five rounds
KEY = 3  # tokens
VALUE = (2, 5)  # tokens, from ... to
# Two facts are of any tokens. More are harder to tell apart:
SYMBOLS = 16  # tokens that all keys and values of a row are made of: none says alone which fact it belongs to
MOST_PHRASE = 8  # tokens between a key and its value, the same in all facts of the row: the key must be remembered


class Drills:
    """Rows for sequences of `length` tokens, each a function of the seed and its number.

    A row has `length - 1` tokens, its eos included, as those of `rows.Rows`; a fact for each 32 of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, seed: int) -> None:
        if length < 2 * TOKENS_A_FACT:
            raise ValueError(f"drills have two facts or more: at least {2 * TOKENS_A_FACT} tokens, got {length}.")
        if length > (longest := TOKENS_A_FACT * SYMBOLS**KEY // 2):
            raise ValueError(f"drills have facts for half of the keys there are: {longest} tokens, got {length}.")
        self.length, self.seed, self.facts = length, seed, length // TOKENS_A_FACT
        self.vocab_size, self._eos = Encoder(tokenizer).vocab_size, tokenizer.eos_token_id
        self._plain_ids = np.setdiff1d(np.arange(self.vocab_size), tokenizer.all_special_ids)

    def row(self, number: int) -> np.ndarray:
        """Ids of row `number`, [length - 1]."""
        random = np.random.default_rng([self.seed, self.length, number])
        symbols, phrase = self._plain_ids, self._plain_ids[:0]
        if self.facts > 2:
            symbols = random.choice(symbols, SYMBOLS, replace=False)
            phrase = random.choice(self._plain_ids, random.integers(0, MOST_PHRASE, endpoint=True))
        keys: dict[tuple[int, ...], None] = {}  # different ones
        while len(keys) < self.facts:
            keys[tuple(random.choice(symbols, KEY))] = None
        values = [random.choice(symbols, random.integers(*VALUE, endpoint=True)) for _ in keys]
        facts = [np.concatenate([key, phrase, value]) for key, value in zip(keys, values, strict=True)]
        told: list[np.ndarray] = []
        while sum(map(len, told)) < self.length - 2:
            told += [facts[i] for i in random.permutation(self.facts)]
        return np.append(np.concatenate(told)[: self.length - 2], self._eos)
