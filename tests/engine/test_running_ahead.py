"""A step is launched before the tokens of the one before are read: what these turn out to be changes no answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from oncelm.engine.engine import Engine
from oncelm.engine.outputs import RequestOutput
from oncelm.engine.params import SamplingParams
from oncelm.engine.work import UNREAD
from tests.engine.test_engine import (
    alone,
    check_no_leak,
    drawn,
    greedy,
    make_engine,
    make_model,
    model_of,
    prompts_of,
    run,
    tokens_of,
    written_by,
)


def make_ahead(model: Any = None, **options: Any) -> Engine:
    """An engine that runs ahead as on a GPU."""
    engine = make_engine(model, **options)
    engine.returns_at_launch = True
    return engine


def watch(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The tokens of all rows, pass by pass."""
    decode, passes = engine.runner.decode, []

    def watched(rows: Any) -> torch.Tensor:
        passes.append([token for row in rows for token in row.tokens])
        return decode(rows)

    monkeypatch.setattr(engine.runner, "decode", watched)
    return passes


def test_rows_are_launched_without_knowing_their_token(monkeypatch) -> None:
    engine = make_ahead()
    passes = watch(engine, monkeypatch)
    engine.add_request("0", [5, 6, 7], greedy(5))
    told = []
    while engine.has_unfinished():
        engine.step()
        told.append(engine.metrics().counts.sampled_tokens)
    assert passes == [[7]] + [[UNREAD]] * 4  # and none behind the last token
    assert told == [0, 1, 2, 3, 4, 5]


LOOKING_BACK = [
    {"repetition_penalty": 1.2},
    {"presence_penalty": 0.5},
    {"logits_processors": [lambda a, b, x: x]},
]


@pytest.mark.parametrize("params", LOOKING_BACK)
def test_what_looks_back_waits(params, monkeypatch) -> None:
    answers = []
    for make in (make_engine, make_ahead):
        engine = make()
        passes = watch(engine, monkeypatch)
        engine.add_request("0", [5, 6, 7], greedy(**params))
        engine.add_request("1", [5, 6, 8], greedy())
        answers.append([(tokens_of(output), output.outputs[0].logprobs) for output in run(engine).values()])
        assert not any(UNREAD in tokens for tokens in passes)
        check_no_leak(engine)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("caching", [False, True])
def test_a_token_that_ends_an_answer(caching) -> None:
    """The row behind it is thrown away, and the next turn goes on behind the token that it has read."""
    prompt, other = [5, 6, 7], [5, 6, 8]
    third = alone(prompt)[2]
    count = alone(prompt).index(third) + 1
    engine = make_ahead(enable_prefix_caching=caching)
    engine.eos_token_ids = frozenset({third})
    engine.add_request("stop token", prompt, greedy(stop_token_ids=[third]))
    engine.add_request("eos", prompt, SamplingParams(temperature=0, max_tokens=8))
    engine.add_request("other", other, greedy())
    outputs = run(engine)
    for name in ("stop token", "eos"):
        answer = outputs[name].outputs[0]
        assert (answer.token_ids, answer.finish_reason) == (alone(prompt)[:count], "stop")
    assert tokens_of(outputs["other"]) == alone(other)
    turn = [*prompt, *alone(prompt)[:count], 3, 4]
    engine.add_request("next turn", turn, greedy())
    output = run(engine)["next turn"]
    assert tokens_of(output) == alone(turn)
    assert output.num_cached_tokens == (len(turn) - 2 if caching else 0)
    check_no_leak(engine)


def test_places_that_an_ending_frees() -> None:
    """What the thrown away row still writes harms nobody who gets its memory."""
    prompts = prompts_of(5, 8, longest=20)
    engine = make_ahead(num_pages=16, max_num_seqs=2, enable_prefix_caching=False)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy(20, stop_token_ids=[alone(prompt, 20)[i]]))
    outputs = run(engine)
    for i, prompt in enumerate(prompts):
        expected = alone(prompt, 20)
        assert tokens_of(outputs[str(i)]) == expected[: expected.index(expected[i]) + 1]
    check_no_leak(engine)


@pytest.mark.parametrize("kind", ["retention", "window", "hybrid"])
@pytest.mark.parametrize("caching", [False, True])
def test_memory_that_is_taken_under_way(kind, caching, monkeypatch) -> None:
    engine = make_ahead(model_of(kind), num_pages=14, enable_prefix_caching=caching)
    if caching:
        engine.memory.keeps_below = True
    passes, prompts = watch(engine, monkeypatch), prompts_of(1, 6, longest=20)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy(20, n=1 + (i == 2)))
    outputs = run(engine)
    assert engine.metrics().counts.preemptions
    assert sum(tokens.count(UNREAD) for tokens in passes) > 80
    for i, prompt in enumerate(prompts):
        assert all(answer.token_ids == alone(prompt, 20, kind) for answer in outputs[str(i)].outputs)
    check_no_leak(engine)


def test_a_row_that_is_thrown_away_may_not_be_finite() -> None:
    """The snapshot at the end of the answer has taken in a token that leads nowhere: nobody may go on from there."""
    prompt = [5, 6, 7]
    third = alone(prompt)[2]
    model = make_model("retention")
    engine = make_ahead(model)
    decode = engine.runner.decode

    def poisoned(rows: Any) -> torch.Tensor:
        logits = decode(rows)
        for n, row in enumerate(rows):
            if row.start == 5:  # reads the third token of the answer
                logits[n] = float("nan")
        return logits

    engine.runner.decode = poisoned
    engine.add_request("ends", prompt, greedy(stop_token_ids=[third]))
    output = run(engine)["ends"]
    assert tokens_of(output) == alone(prompt)[:3]
    assert engine.cache is not None
    assert not [snapshot.n for snapshot in engine.cache.tree if snapshot.slot and snapshot.n > 5]
    engine.add_request("fails", prompt, greedy())
    answer = run(engine)["fails"].outputs[0]
    assert answer.token_ids == alone(prompt)[:3]
    assert "finite" in (answer.error or "")
    check_no_leak(engine)


def test_a_draw_that_is_corrected_late(monkeypatch) -> None:
    """Where the likeliest tokens do not make up top_p, the first choice is wrong, and so is what has read it."""
    params = SamplingParams(seed=3, temperature=3.0, top_p=0.9, max_tokens=8, ignore_eos=True)
    plain = make_engine()
    plain.add_request("0", [5, 6, 7], params)
    expected = tokens_of(run(plain)["0"])
    monkeypatch.setattr("oncelm.engine.sampler.NARROW", 4)
    engine = make_ahead()
    engine.add_request("0", [5, 6, 7], params)
    engine.add_request("1", [5, 6, 8], greedy())
    outputs = run(engine)
    assert tokens_of(outputs["0"]) == expected
    assert tokens_of(outputs["1"]) == alone([5, 6, 8])
    assert engine.metrics().counts.sampled_tokens == 16
    check_no_leak(engine)


def test_a_draw_that_is_corrected_late_and_ends_the_answer(monkeypatch) -> None:
    """Nothing is kept of a row that has read another token than the one that stands there."""
    monkeypatch.setattr("oncelm.engine.sampler.NARROW", 4)
    for seed in (6, 8, 9):  # the likeliest tokens do not do for these
        params = {"seed": seed, "temperature": 3.0, "top_p": 0.9, "ignore_eos": True}
        plain = make_engine()
        plain.add_request("0", [5, 6, 7], SamplingParams(max_tokens=1, **params))
        (token,) = tokens_of(run(plain)["0"])
        engine = make_ahead()
        engine.add_request("0", [5, 6, 7], SamplingParams(stop_token_ids=[token], **params))
        assert tokens_of(run(engine)["0"]) == [token]
        engine.add_request("1", [5, 6, 7, token, 3, 4], greedy())
        assert tokens_of(run(engine)["1"]) == alone([5, 6, 7, token, 3, 4])
        check_no_leak(engine)


def test_draws_are_those_of_their_place() -> None:
    found: list[dict[str, RequestOutput]] = []
    for make in (make_engine, make_ahead):
        engine = make()
        for i, prompt in enumerate(prompts_of(8, 5)):
            engine.add_request(str(i), prompt, replace(drawn(i), logprobs=[None, 0, 2, -1][i % 4]))
        found.append(run(engine))
    for name, output in found[0].items():
        assert tokens_of(output) == tokens_of(found[1][name])
        right, answer = output.outputs[0], found[1][name].outputs[0]
        assert [len(table) for table in answer.logprobs or ()] == [len(table) for table in right.logprobs or ()]
        assert answer.cumulative_logprob == pytest.approx(right.cumulative_logprob, abs=1e-3)


@pytest.mark.parametrize("where", ["choose", "read"])
def test_memory_that_runs_out_at_the_choice(where, monkeypatch) -> None:
    engine, prompts = make_ahead(), prompts_of(4, 3, longest=16)
    done, count = getattr(engine.sampler, where), 0

    def fails(*given: Any) -> Any:
        nonlocal count
        count += 1
        if count == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return done(*given)

    monkeypatch.setattr(engine.sampler, where, fails)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy())
    outputs = run(engine)
    errors = [output.outputs[0].error for output in outputs.values()]
    assert sum(error is not None for error in errors) == 1
    for i, prompt in enumerate(prompts):
        tokens = outputs[str(i)].outputs[0].token_ids
        assert tokens == alone(prompt)[: len(tokens)]
    check_no_leak(engine)


def test_a_model_of_its_own_after_an_abort() -> None:
    engine = make_ahead(max_num_seqs=1, enable_prefix_caching=False)
    for moment in range(1, 5):
        engine.add_request("leaves", [9] * moment, greedy())
        engine.add_request("stays", [5, 6, 7], greedy())
        for _ in range(moment):
            engine.step()
        engine.abort_request("leaves")
        outputs = run(engine)
        assert tokens_of(outputs["stays"]) == written_by(model_of(), [5, 6, 7], 8)
    check_no_leak(engine)
