"""Passkey prompts are of the length asked for, hide one key between two sentences, and share what they can."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm import load_tokenizer
from oncelm.eval import TASKS, Codec, Generate, make_task
from oncelm.eval.results import Run
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


def test_depths() -> None:
    codec = Codec(load_tokenizer("bytes"), 260)
    task = make_task(TASKS["passkey"], lengths=(900, 1500), depths=3, trials=2)
    examples = list(task.examples(codec, 0))
    assert len(examples) == task.count() == 12
    assert [(e.tags["context_length"], e.tags["depth"]) for e in examples] == [
        (length, depth) for length in (900, 1500) for depth in (0.0, 0.0, 50.0, 50.0, 100.0, 100.0)
    ]
    prompts = [codec.decode(e.prompt) for e in examples[:6]]
    behind = [prompt.partition("is the pass key.\n")[2] for prompt in prompts]
    assert behind[0].count(FILLER) == prompts[0].count(FILLER) > 2  # all of it comes later
    assert abs(2 * behind[2].count(FILLER) - prompts[2].count(FILLER)) <= 1
    assert FILLER not in behind[4]
    assert {e.tags["depth"] for e in make_task(TASKS["passkey"], lengths=(900,), depths=1).examples(codec, 0)} == {50.0}
    for wrong in ({"depths": -1}, {"depths": 1.5}, {"trials": 0}):
        with pytest.raises(ValueError, match=rf"{next(iter(wrong))} must be a whole number of at least [01]"):
            make_task(TASKS["passkey"], **wrong)


def passkey_run(scores: dict[tuple[int, float], list[float]], depths: int) -> Run:
    options = {"lengths": [1024, 2048], "depths": depths, "trials": 2}
    samples = {
        i: {"tags": {"context_length": length, "depth": depth}, "scores": {"correct": score}}
        for i, (length, depth, score) in enumerate((*key, s) for key, found in scores.items() for s in found)
    }
    return Run({"task": "passkey", "options": options, "seed": 0, "model": {"name": f"m{depths}"}}, {}, samples)


def test_what_a_report_shows() -> None:
    even = passkey_run({(1024, 0.0): [1, 1], (1024, 100.0): [0, 1], (2048, 0.0): [0, 0], (2048, 100.0): [1, 0]}, 2)
    random = passkey_run({(1024, 31.7): [1], (1024, 80.2): [0]}, 0)
    table, curves, depths = TASKS["passkey"].views([even, random])
    assert curves.series == {"m2": [(1024, 0.75), (2048, 0.25)], "m0": [(1024, 0.5)]}
    assert depths.title == "m2"
    assert depths.values == [[1.0, 0.0], [0.5, 0.5]]
    assert table.rows
