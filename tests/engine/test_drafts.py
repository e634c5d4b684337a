"""Drafts by prompt lookup: they follow what stood before, and few are made where they are wrong."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.engine import drafts
from oncelm.engine.drafts import MOST_PAUSE, NgramIndex, PromptLookup, can_draft
from oncelm.engine.params import SamplingParams


def find_slowly(tokens: list[int], longest: int, shortest: int) -> int:
    """Behind the latest earlier place of the last tokens, as many as possible."""
    for n in range(longest, shortest - 1, -1):
        for end in range(len(tokens) - 1, longest - 1, -1):
            if tokens[end - n : end] == tokens[len(tokens) - n :]:
                return end
    return 0


@settings(max_examples=60, deadline=None)
@given(data=st.data(), vocab=st.sampled_from([1, 2, 4]), longest=st.integers(1, 5))
def test_finds_the_latest_place_of_the_longest_ending(data, vocab, longest) -> None:
    shortest = data.draw(st.integers(1, longest))
    text = data.draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=60))
    index, seen = NgramIndex(longest, shortest), 0
    while seen < len(text):  # any pieces
        seen += min(data.draw(st.sampled_from([1, 1, 2, 9, 30])), len(text) - seen)
        assert index.find(text[:seen]) == find_slowly(text[:seen], longest, shortest)


def test_a_long_text_is_found_in_memory_of_fixed_size(monkeypatch) -> None:
    """Also where it is taken in by several calls, and where the index is as large as it may get."""
    monkeypatch.setattr(drafts, "MOST_ENTRIES", 1 << 12)
    monkeypatch.setattr(drafts, "AT_ONCE", 1000)
    draw = random.Random(0)
    text = [draw.randrange(50_000) for _ in range(20_000)]
    index = NgramIndex(5, 3)
    index.find(text)
    assert index.ends.shape == (3, 1 << 12)
    found = 0
    for place in range(19_000, 20_000 - 9, 9):  # the latest ones are there, but for the few that share a place
        for token in text[place : place + 5]:
            text.append(token)
            end = index.find(text)
        found += end == place + 5
        assert end in (0, place + 5)
    assert found > 80


def follow(lookup: PromptLookup, tokens: list[int], answer: list[int], max_drafts: int) -> list[int]:
    """Write `answer` behind `tokens` as a model does that wants to: how many drafts each step had."""
    whole, counts = tokens + answer, []
    while len(tokens) < len(whole):
        proposed = lookup.propose(tokens, min(max_drafts, len(whole) - len(tokens) - 1))
        counts.append(len(proposed))
        right = next((i for i, draft in enumerate(proposed) if draft != whole[len(tokens) + i]), len(proposed))
        tokens = whole[: len(tokens) + right + 1]
    return counts


def test_a_copy_takes_few_steps() -> None:
    prompt = random.Random(0).sample(range(1000), 500)
    lookup = PromptLookup()
    counts = follow(lookup, prompt + prompt[10:13], prompt[13:213], 7)
    assert counts[:3] == [4, 7, 7]
    assert len(counts) == 26  # 4 + 1 tokens and then 7 + 1
    assert lookup.num_right == lookup.num_proposed - counts[-1]  # of the last ones it has not been told


def test_what_repeats_itself_is_drafted_beyond_its_end() -> None:
    assert PromptLookup(3, 3).propose([9, 8, 1, 2, 1, 2, 1], 4) == [2, 1, 2, 1]
    assert PromptLookup(1, 1).propose([5, 5], 3) == [5, 5, 5]


def test_wrong_drafts_make_it_wait() -> None:
    """Every ending stood before, and something else follows each time."""
    lookup = PromptLookup(1, 1)
    text = [token for i in range(300) for token in (0, 1 + i)]
    counts = follow(lookup, text[:2], text[2:], 5)
    proposed = [step for step, count in enumerate(counts) if count]
    assert lookup.num_right == 0
    assert len(proposed) < 22
    assert max(b - a for a, b in pairwise(proposed)) <= 2 * MOST_PAUSE


def test_a_second_call_with_the_same_tokens_is_harmless() -> None:
    lookup = PromptLookup(1, 1)
    assert lookup.propose([3, 4, 3], 2) == [4, 3]
    assert lookup.propose([3, 4, 3], 2) == []
    assert lookup.propose([3, 4, 3, 4], 2) == [3, 4]


def test_no_room_no_drafts() -> None:
    assert PromptLookup(1, 1).propose([3, 4, 3], 0) == []
    assert PromptLookup(1, 1).propose([], 3) == []


def test_no_drafts_where_a_rule_may_keep_a_state() -> None:
    assert can_draft(SamplingParams())
    assert can_draft(SamplingParams(presence_penalty=0.5, stop=["x"], logprobs=2))
    assert can_draft(SamplingParams(structured={"choice": ["a", "b"]}))
    assert not can_draft(SamplingParams(logits_processors=[lambda prompt, output, logits: logits]))


def test_sizes_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="shortest must be from 1"):
        PromptLookup(3, 4)
