"""Passkey prompts are of the length asked for, hide one key between two sentences, and share what they can."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm import load_tokenizer
from oncelm.eval import TASKS, Codec, Generate, make_task
from oncelm.eval.tasks.passkey import FILLER


@settings(deadline=None, max_examples=20)
@given(st.integers(500, 3000), st.integers(1, 9), st.integers(0, 5))
def test_prompts(length, trials, seed) -> None:
    codec = Codec(load_tokenizer("bytes"), 260)
    task = make_task(TASKS["passkey"], lengths=(length,), trials=trials)
    examples = list(task.examples(codec, seed))
    assert len(examples) == task.count() == trials
    for example in examples:
        prompt = codec.decode(example.prompt)
        assert len(example.prompt) + example.max_new_tokens == length
        found = re.search(r"\nThe pass key is (\d+)\. Remember it\. \1 is the pass key\.\n", prompt)
        assert found[1] == example.target
        before = prompt[: found.start()].partition("there.\n")[2]
        assert before == FILLER * (len(before) // len(FILLER))
        assert prompt.endswith("\nWhat is the pass key? The pass key is")
    depths = [e.tags["depth"] for e in examples]
    assert depths == sorted(depths)
    assert [bytes(e.prompt) for e in examples] == [bytes(e.prompt) for e in task.examples(codec, seed)]


@pytest.mark.parametrize(("output", "right"), [(" 123.", 1), ("123", 1), ("1234", 0), ("x 123", 0), ("12", 0), ("", 0)])
def test_the_judge(output, right) -> None:
    assert make_task(TASKS["passkey"]).score(Generate(np.zeros(1, np.int32), "123", 9), output) == {"correct": right}


@given(st.text(alphabet="12 .\n", max_size=8), st.integers(0, 8))
def test_what_is_decided_stays_so(text, more) -> None:
    task, example = make_task(TASKS["passkey"]), Generate(np.zeros(1, np.int32), "12", 9)
    if task.decided(example, text[:more]):
        assert task.score(example, text[:more]) == task.score(example, text)


def test_too_short() -> None:
    task = make_task(TASKS["passkey"], lengths=(200,))
    with pytest.raises(ValueError, match=r"200 tokens is too short: a passkey prompt takes \d+"):
        list(task.examples(Codec(load_tokenizer("bytes")), 0))
