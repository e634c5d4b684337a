"""Prompts of every form, and what is said of those that cannot be run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from oncelm.data.tokenizers import load_tokenizer
from oncelm.engine.intake import Intake, answer_length, read_prompt
from oncelm.engine.params import SamplingParams

PLAN: Any = SimpleNamespace(max_model_len=64, num_tokens=1000)


@pytest.mark.parametrize(
    "prompt",
    [
        [72, 109],
        (72, 109),
        np.array([72, 109]),
        torch.tensor([72, 109]),
        [np.int64(72), np.int64(109)],
        {"prompt_token_ids": [72, 109]},
    ],
)
def test_token_ids_of_every_kind(prompt) -> None:
    text, ids, encoded = read_prompt(prompt, None, 260)
    assert text is None
    assert ids == encoded.tolist() == [72, 109]
    assert [type(token) for token in ids] == [int, int]


def test_text() -> None:
    tokenizer = load_tokenizer("bytes")
    assert read_prompt("Di", tokenizer, 260).ids == [72, 109]
    assert read_prompt({"prompt": "Di"}, tokenizer, 260).ids == [72, 109]
    text, ids, _ = read_prompt({"prompt": "Di", "prompt_token_ids": [5]}, tokenizer, 260)
    assert (text, ids) == ("Di", [5])


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (b"Di", "decode it to text"),
        ("a\ud800", r"valid Unicode, got '\\ud800' at character 1"),
    ],
)
def test_what_is_no_text(prompt, said) -> None:
    with pytest.raises(ValueError, match=said):
        read_prompt(prompt, load_tokenizer("bytes"), 260)


def test_answers_that_fit() -> None:
    assert answer_length(10, 54, PLAN) == 54
    assert answer_length(10, None, PLAN) == 54
    with pytest.raises(ValueError, match="max_model_len=64 allows; max_tokens=54 would fit"):
        answer_length(10, 55, PLAN)
    with pytest.raises(ValueError, match="with max_model_len=64, at most 63 fit"):
        answer_length(64, None, PLAN)
    small: Any = SimpleNamespace(max_model_len=64, num_tokens=32)
    with pytest.raises(ValueError, match="the memory planned for 32 tokens allows; max_tokens=22 would fit"):
        answer_length(10, 30, small)


def test_seeds() -> None:
    """Each answer has one; those of requests without a seed follow from the engine's."""
    seeds = []
    for _ in range(2):
        intake = Intake(None, 260, frozenset(), PLAN, seed=3)
        first, second = intake.requests("0", [5], SamplingParams(n=2), 0.0)
        (third,) = intake.requests("1", [5], SamplingParams(), 0.0)
        (given,) = intake.requests("2", [5], SamplingParams(seed=7), 0.0)
        assert second.seed == first.seed + 1
        assert first.seed != third.seed
        assert given.seed == 7
        assert first.arrival < third.arrival < given.arrival
        seeds.append((first.seed, third.seed))
    assert seeds[0] == seeds[1]


def test_a_document_has_a_snapshot_before_its_end_too() -> None:
    """Where a tokenizer joins its end with the text of a question, that is what is found."""
    request = Intake(None, 260, frozenset(), PLAN, 0).document("0", [5] * 40, 0.0)
    assert (request.end, request.cuts, request.max_tokens) == (40, {32}, 0)
    assert Intake(None, 260, frozenset(), PLAN, 0).document("0", [5] * 10, 0.0).cuts == set()
