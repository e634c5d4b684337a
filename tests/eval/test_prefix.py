"""What prompts share is read once, and every prompt is read as it is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oncelm.eval import Generate
from oncelm.eval import prefix as module
from oncelm.eval.prefix import PrefixReader


@dataclass
class FakeReader:
    """Reads into a list; rewinding to a mark forgets the marks behind it, as a rewind point of a cache does."""

    max_tokens: int
    text: list[int] = field(default_factory=list)
    valid: list[int] = field(default_factory=list)
    tokens_read: int = 0

    def read(self, ids, progress=None) -> None:
        self.text += ids.tolist()
        self.tokens_read += len(ids)
        assert len(self.text) <= self.max_tokens

    def mark(self) -> int:
        self.valid.append(len(self.text))
        return len(self.text)

    def rewind(self, mark: int) -> None:
        assert mark in self.valid, "a mark that was overwritten"
        self.valid = [place for place in self.valid if place <= mark]
        del self.text[mark:]

    def restart(self) -> None:
        self.text.clear()
        self.valid.clear()

    def generate(self) -> None:
        self.text.append(-1)


class FakeModel:
    shares = True

    def __init__(self) -> None:
        self.readers: list[FakeReader] = []

    def start(self, max_tokens: int) -> FakeReader:
        self.readers.append(FakeReader(max_tokens))
        return self.readers[-1]


def read_all(prompts: list[list[int]], ahead: int = 100) -> int:
    """Tokens read for all prompts, each followed by an answer."""
    model = FakeModel()
    prefix = PrefixReader(model)
    examples = [Generate(np.array(prompt, np.int32), "", 1) for prompt in prompts]
    total = 0
    for i, example in enumerate(examples):
        reader, read = prefix.read(example, examples[i + 1 : i + 1 + ahead])
        assert reader.text == prompts[i]
        total += read
        reader.generate()
    assert total == sum(reader.tokens_read for reader in model.readers)
    return total


def trie_size(prompts: list[list[int]]) -> int:
    return len({tuple(prompt[: i + 1]) for prompt in prompts for i in range(len(prompt))})


@pytest.fixture(autouse=True)
def _every_token_counts(monkeypatch) -> None:
    monkeypatch.setattr(module, "WORTH_SHARING", 1)


PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12)


@given(PROMPTS)
def test_sorted_prompts_cost_their_trie(prompts) -> None:
    prompts.sort()
    # two prompts of one beginning, without anything of a third between, need no token twice
    assert read_all(prompts) == trie_size(prompts)


@given(PROMPTS, st.integers(0, 5))
def test_any_order_and_look_ahead_reads_every_prompt_right(prompts, ahead) -> None:
    assert trie_size(prompts) <= read_all(prompts, ahead) <= sum(map(len, prompts))


def test_a_needle_that_moves_deeper() -> None:
    text, size = list(range(100, 200)), 10
    prompts = [[*text[:d], 7, *text[d:]] for d in range(0, 100, size)]
    assert read_all(prompts) == trie_size(prompts) == 650 < sum(map(len, prompts)) == 1010


def test_short_beginnings_are_not_worth_a_mark(monkeypatch) -> None:
    monkeypatch.setattr(module, "WORTH_SHARING", 4)
    assert read_all([[1, 2, 3, 4], [1, 2, 3, 5]]) == 8
    assert read_all([[1, 2, 3, 4, 4], [1, 2, 3, 4, 5]]) == 6
