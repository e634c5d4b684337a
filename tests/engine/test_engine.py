"""The loop on tiny models: every answer is what the model alone gives, whatever else runs, and whatever goes wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from itertools import cycle
from typing import Any

import pytest
import torch

from oncelm import YocoForCausalLM
from oncelm.engine.engine import Engine
from oncelm.engine.options import EngineOptions
from oncelm.engine.outputs import RequestOutput
from oncelm.engine.params import SamplingParams
from oncelm.engine.pool import Pool
from tests.models.small import KINDS, VOCAB, make_model

PAGE = 4


@cache
def model_of(kind: str = "retention") -> YocoForCausalLM:
    return make_model(kind)


def make_engine(model: Any = None, num_pages: int | None = None, **options: Any) -> Engine:
    """An engine with small pages and pieces, and with memory for exactly `num_pages` pages if they are given."""
    model = model_of() if model is None else model
    options = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16, "page_size": PAGE} | options
    if num_pages is not None:
        kept = options["num_snapshots"] = 2 if options.get("enable_prefix_caching", True) else 0
        slots = (1 + options["max_num_seqs"] + kept) * Pool.slot_bytes(model.config, model.dtype)
        options["kv_cache_bytes"] = slots + (1 + num_pages) * Pool.page_bytes(model.config, PAGE, model.dtype)
        options["max_model_len"] = min(options["max_model_len"], num_pages * PAGE)
    options.setdefault("kv_cache_bytes", 2**21)
    return Engine(model, None, EngineOptions(verbose=False, **options))


def greedy(max_tokens: int | None = 8, **more: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, **more)


def drawn(seed: int) -> SamplingParams:
    return SamplingParams(seed=seed, temperature=0.3, max_tokens=10, ignore_eos=True)


def prompts_of(seed: int, count: int, longest: int = 40) -> list[list[int]]:
    """Of all lengths; many begin alike."""
    rng = random.Random(seed)
    document = [rng.randrange(VOCAB) for _ in range(longest)]
    return [
        document[: rng.randrange(longest - 8)] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 8))]
        for _ in range(count)
    ]


@cache
def _alone(kind: str, prompt: tuple[int, ...], count: int) -> list[int]:
    return written_by(model_of(kind), prompt, count)


def written_by(model: YocoForCausalLM, prompt: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    model.generation_config.eos_token_id = None
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


def alone(prompt: list[int], count: int = 8, kind: str = "retention") -> list[int]:
    """What the model writes where nothing else runs."""
    return _alone(kind, tuple(prompt), count)


def run(engine: Engine) -> dict[str, RequestOutput]:
    outputs = {}
    for _ in range(2000):
        if not engine.has_unfinished():
            return outputs
        outputs |= {output.request_id: output for output in engine.step()}
    raise AssertionError("it does not end")


def check_no_leak(engine: Engine) -> None:
    engine.close()
    assert engine.pages.num_used == engine.slots.num_used == 0
    engine.pages.check()
    engine.slots.check()


def tokens_of(output: RequestOutput) -> list[int]:
    assert output.finished
    assert output.outputs[0].error is None
    return output.outputs[0].token_ids


@pytest.mark.parametrize(("kind", "returns_at_launch"), [*zip(KINDS, cycle([False, True]), strict=False)])
def test_mixed_requests(kind, returns_at_launch) -> None:
    engine, prompts = make_engine(model_of(kind)), prompts_of(0, 6)
    engine.returns_at_launch = returns_at_launch
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy())
        if i % 3 == 2:
            engine.step()
    outputs = run(engine)
    for i, prompt in enumerate(prompts):
        output = outputs[str(i)]
        assert tokens_of(output) == alone(prompt, kind=kind)
        assert output.outputs[0].finish_reason == "length"
        assert len(output.metrics.token_times) == 8
    check_no_leak(engine)


@pytest.mark.parametrize(("kind", "caching"), [("retention", False), ("hybrid", True)])
def test_preemption(kind, caching) -> None:
    """Memory for about two of the requests, which grow."""
    engine = make_engine(model_of(kind), num_pages=14, enable_prefix_caching=caching)
    prompts = prompts_of(1, 5, longest=20)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy(20))
    outputs = run(engine)
    assert engine.metrics().counts.preemptions
    for i, prompt in enumerate(prompts):
        assert tokens_of(outputs[str(i)]) == alone(prompt, 20, kind)
    check_no_leak(engine)


@pytest.mark.parametrize("returns_at_launch", [False, True])
def test_abort_at_any_moment(returns_at_launch) -> None:
    engine, prompts = make_engine(), prompts_of(2, 12)
    engine.returns_at_launch = returns_at_launch
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy(n=1 + i % 2))
    outputs: dict[str, RequestOutput] = {}
    for i in range(0, 12, 2):
        outputs |= {output.request_id: output for output in engine.step()}
        engine.abort_request(str(i))
        engine.abort_request(str(i))
    outputs |= run(engine)
    for i, prompt in enumerate(prompts):
        answers = outputs[str(i)].outputs
        assert outputs[str(i)].finished
        assert all(answer.finish_reason == ("length" if i % 2 else answer.finish_reason) for answer in answers)
        assert all(answer.token_ids == alone(prompt)[: len(answer.token_ids)] for answer in answers)
        assert all(len(answer.token_ids) == 8 for answer in answers if answer.finish_reason == "length")
    assert any(outputs[str(i)].outputs[0].finish_reason == "abort" for i in range(0, 12, 2))
    engine.abort_request("nobody")
    check_no_leak(engine)


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("length", [1, 4, 5, 22])
def test_several_answers_read_the_prompt_once(caching, length) -> None:
    engine, prompt = make_engine(enable_prefix_caching=caching), prompts_of(3, 1)[0][:length]
    prompt = (prompt * length)[:length]
    engine.add_request("greedy", prompt, greedy(n=3))
    output = run(engine)["greedy"]
    assert [answer.token_ids for answer in output.outputs] == [alone(prompt)] * 3
    assert engine.metrics().counts.prefill_tokens == length - 1
    engine.add_request("drawn", prompt, SamplingParams(n=3, seed=5, max_tokens=8, ignore_eos=True))
    found = [answer.token_ids for answer in run(engine)["drawn"].outputs]
    assert len({tuple(tokens) for tokens in found}) == 3
    for i in range(3):  # each is that of its own seed
        engine.add_request(str(i), prompt, SamplingParams(seed=5 + i, max_tokens=8, ignore_eos=True))
    assert [tokens_of(output) for _, output in sorted(run(engine).items())] == found
    check_no_leak(engine)


def test_more_answers_than_places() -> None:
    engine = make_engine(max_num_seqs=2)
    engine.add_request("many", [5, 6, 7], greedy(n=5))
    assert [answer.token_ids for answer in run(engine)["many"].outputs] == [alone([5, 6, 7])] * 5
    check_no_leak(engine)


def test_what_ends_an_answer() -> None:
    prompt = [5, 6, 7]
    expected = alone(prompt, 61)
    engine = make_engine()
    third = expected[2]
    count = expected.index(third) + 1
    engine.add_request("stop token", prompt, greedy(stop_token_ids=[third]))
    engine.add_request("all that fits", prompt, greedy(None))
    engine.eos_token_ids = frozenset({third})
    engine.add_request("eos", prompt, SamplingParams(temperature=0, max_tokens=8))
    outputs = run(engine)
    answer = outputs["stop token"].outputs[0]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == (expected[:count], "stop", third)
    answer = outputs["eos"].outputs[0]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == (expected[:count], "stop", None)
    assert tokens_of(outputs["all that fits"]) == expected
    assert outputs["all that fits"].outputs[0].finish_reason == "length"
    check_no_leak(engine)


@pytest.mark.parametrize(
    ("prompt", "params", "error"),
    [
        ([], greedy(), "the prompt is empty"),
        ("", greedy(), "needs a tokenizer"),
        ("text", greedy(), "needs a tokenizer"),
        (7, greedy(), "must be text or token ids, got 7"),
        ([1, VOCAB], greedy(), f"from 0 to {VOCAB - 1}, got {VOCAB}"),
        ([1, -1], greedy(), f"from 0 to {VOCAB - 1}, got -1"),
        ([1, 2.0], greedy(), "got 2.0"),
        ([1, "a"], greedy(), "got 'a'"),
        ([1, True], greedy(), "got True"),
        ({"prompt_ids": [1]}, greedy(), "did you mean 'prompt_token_ids'"),
        ([1] * 64, greedy(), "at most 63 fit"),
        ([1] * 60, greedy(5), "max_tokens=4 would fit"),
        ([1] * 100_000, greedy(), "the prompt has 100,000 tokens"),
        ([1], greedy(stop_token_ids=[VOCAB]), "stop_token_ids"),
    ],
)
def test_what_is_refused_at_once(prompt, params, error) -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match=error):
        engine.add_request("odd", prompt, params)
    with pytest.raises(ValueError, match="priority must be a whole number"):
        engine.add_request("odd", [1], priority="high")
    assert not engine.has_unfinished()
    engine.add_request("odd", {"prompt_token_ids": [5, 6, 7], "prompt": "as text"}, greedy())
    with pytest.raises(ValueError, match="'odd' is in use"):
        engine.add_request("odd", [1], greedy())
    output = run(engine)["odd"]
    assert tokens_of(output) == alone([5, 6, 7])
    assert output.prompt == "as text"


def test_what_does_not_fit_all_pages_is_refused() -> None:
    engine = make_engine(num_pages=8)
    assert engine.plan.num_tokens == 32
    with pytest.raises(ValueError, match="max_tokens=12 would fit"):
        engine.add_request("large", [1] * 20, greedy(13))
    engine.add_request("exact", [1] * 20, greedy(12))
    engine.add_request("beside", [1] * 20, greedy(12))
    outputs = run(engine)
    assert tokens_of(outputs["exact"]) == tokens_of(outputs["beside"]) == alone([1] * 20, 12)
    check_no_leak(engine)


# -- one fails, the others do not ---------------------------------------------------------------------------------


def test_logits_that_are_not_finite() -> None:
    model = make_model("retention")
    with torch.no_grad():
        model.embed_tokens.weight[7] = float("nan")
    engine, sound, rotten = make_engine(model), [5, 6, 8] * 5, [5, 6, 7] * 5
    for i, prompt in enumerate([sound, rotten, sound, rotten]):
        engine.add_request(str(i), prompt, greedy())
    outputs = run(engine)
    for i in "13":
        answer = outputs[i].outputs[0]
        assert (answer.finish_reason, answer.token_ids) == ("error", [])
        assert "finite" in answer.error
    for i in "02":
        assert tokens_of(outputs[i]) == written_by(model, sound, 8)
    check_no_leak(engine)


def test_memory_of_a_failed_request_harms_nobody() -> None:
    """What is not finite stays in its pages and slot, which others get next."""
    model = make_model("hybrid")
    with torch.no_grad():
        model.embed_tokens.weight[7] = float("nan")
    engine = make_engine(model, num_pages=10, enable_prefix_caching=False)
    for name, prompt in (("rotten", [7] * 36), ("sound", [5, 6, 8] * 10)):
        engine.add_request(name, prompt, greedy(2))
        output = run(engine)[name]
    assert tokens_of(output) == written_by(model, [5, 6, 8] * 10, 2)


def test_what_loses_its_memory_is_kept_in_cpu_memory() -> None:
    engine, prompts = make_engine(num_pages=14, cpu_cache_bytes=2**20), prompts_of(1, 6, longest=20)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy(20))
    outputs = run(engine)
    for i, prompt in enumerate(prompts):
        assert tokens_of(outputs[str(i)]) == alone(prompt, 20)
    counts = engine.metrics().counts
    assert counts.preemptions
    assert counts.prefill_tokens <= sum(map(len, prompts))  # nothing was read twice
    check_no_leak(engine)


@pytest.mark.parametrize(("where", "returns_at_launch"), [("prefill", False), ("decode", True)])
def test_memory_that_runs_out_in_a_pass(where, returns_at_launch, monkeypatch) -> None:
    engine, prompts = make_engine(), prompts_of(4, 4, longest=16)
    engine.returns_at_launch = returns_at_launch
    prompts.append([9] * 39)
    run_pass, most = getattr(engine.runner, where), 9 if where == "prefill" else 30

    def fails(work: list[Any]) -> Any:
        result = run_pass(work)  # it has changed slots and pages then
        if max(len(one.tokens) if where == "prefill" else one.start for one in work) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return result

    monkeypatch.setattr(engine.runner, where, fails)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy(n=2 if i == 1 else 1))
    outputs = run(engine)
    for i, prompt in enumerate(prompts[:-1]):
        assert all(answer.token_ids == alone(prompt) for answer in outputs[str(i)].outputs)
    answer = outputs["4"].outputs[0]
    assert answer.finish_reason == "error"
    assert "memory ran out" in answer.error
    check_no_leak(engine)


def test_an_error_of_a_logits_processor() -> None:
    def fails(prompt: Any, output: Any, logits: torch.Tensor) -> torch.Tensor:
        if len(output) == 2:
            raise KeyError("of somebody's own")
        return logits

    engine = make_engine()
    engine.add_request("odd", [5, 6, 7], greedy(logits_processors=[fails]))
    engine.add_request("sound", [5, 6, 8], greedy())
    outputs = run(engine)
    answer = outputs["odd"].outputs[0]
    assert (answer.finish_reason, answer.token_ids) == ("error", alone([5, 6, 7])[:2])
    assert "of somebody's own" in answer.error
    assert tokens_of(outputs["sound"]) == alone([5, 6, 8])
    check_no_leak(engine)


@pytest.mark.parametrize("where", ["prefill", "decode"])
def test_any_other_error_is_raised_and_nothing_is_lost(where, monkeypatch) -> None:
    engine = make_engine()
    for i, prompt in enumerate(prompts_of(5, 6)):
        engine.add_request(str(i), prompt, greedy(n=1 + i % 2))

    def fails(work: list[Any]) -> Any:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, where, fails)
        with pytest.raises(RuntimeError, match="a bug"):
            run(engine)
    outputs = run(engine)
    assert any(output.outputs[0].error == "RuntimeError: a bug" for output in outputs.values())
    engine.add_request("later", [5, 6, 7], greedy())
    assert tokens_of(run(engine)["later"]) == alone([5, 6, 7])
    check_no_leak(engine)


@pytest.mark.parametrize(
    ("where", "returns_at_launch"),
    [("schedule", True), ("prefill", False), ("decode", True), ("choose", True), ("read", False), ("read", True)],
)
def test_an_interrupt_changes_no_answer(where, returns_at_launch, monkeypatch) -> None:
    engine, prompts = make_engine(), prompts_of(12, 4)
    engine.returns_at_launch = returns_at_launch
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy())
    holder: Any = next(one for one in (engine.scheduler, engine.runner, engine.sampler) if hasattr(one, where))
    done, count = getattr(holder, where), 0

    def interrupted(*args: Any) -> Any:
        nonlocal count
        count += 1
        result = done(*args)
        if count == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(holder, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(engine)
    outputs = run(engine)
    for i, prompt in enumerate(prompts):
        if str(i) in outputs:  # else it was told before
            assert tokens_of(outputs[str(i)]) == alone(prompt)
    check_no_leak(engine)


# -- what is shared -----------------------------------------------------------------------------------------------


def test_the_same_prompt_again_is_read_no_more() -> None:
    engine, prompt = make_engine(), prompts_of(6, 1)[0]
    for i in range(2):
        engine.add_request(str(i), prompt, greedy())
        output = run(engine)[str(i)]
        assert tokens_of(output) == alone(prompt)
        assert output.num_cached_tokens == (len(prompt) - 1 if i else 0)
    turn = [*prompt, *alone(prompt), 3, 4]
    engine.add_request("next turn", turn, greedy())
    output = run(engine)["next turn"]
    assert tokens_of(output) == alone(turn)
    assert output.num_cached_tokens == len(prompt) + 7  # all but the last token of the answer, which was never read
    engine.add_request("other salt", prompt, greedy(), cache_salt="somebody else's")
    assert run(engine)["other salt"].num_cached_tokens == 0
    check_no_leak(engine)


def test_one_document_and_questions_that_come_together() -> None:
    """It is read once: the others wait for the snapshot where they part."""
    engine = make_engine(max_num_batched_tokens=8)
    document = prompts_of(7, 1)[0] + [1] * 20
    prompts = [[*document, 10 + i, 20 + i] for i in range(4)]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy())
    outputs = run(engine)
    for i, prompt in enumerate(prompts):
        assert tokens_of(outputs[str(i)]) == alone(prompt)
    assert [outputs[str(i)].num_cached_tokens for i in range(4)] == [0] + [len(document)] * 3
    check_no_leak(engine)


def test_requests_that_part_close_to_each_other_share_a_snapshot() -> None:
    """Each piece of the one that reads ends at a snapshot: a hundred of them would be a hundred steps."""
    engine, document = make_engine(max_num_batched_tokens=64, max_num_seqs=8), prompts_of(13, 1)[0] + [1] * 20
    for i in range(6):
        engine.add_request(str(i), [*document[: 20 + i], *([50 + i] * 5)], greedy(1))
    engine.step()
    reader = engine.scheduler.running[0]
    assert len(reader.cuts) <= 2
    outputs = run(engine)
    assert sum(output.num_cached_tokens > 15 for output in outputs.values()) == 5
    check_no_leak(engine)


def test_a_question_that_waits_for_its_turn_finds_its_document() -> None:
    """The half of the first step that the long prompt leaves is just what the shorter one of two questions needs."""
    document = list(range(5))
    longest, first, second = [5] * 60, [*document, 31, 31, 31, 31], [*document, 32, 32, 32, 32, 32]
    engine = make_engine()
    for name, prompt in (("longest", longest), ("first", first), ("second", second)):
        engine.add_request(name, prompt, greedy(2))
    outputs = run(engine)
    assert outputs["second"].num_cached_tokens == len(document)
    assert tokens_of(outputs["second"]) == alone(second, 2)
    check_no_leak(engine)


def test_a_question_on_what_was_read_is_a_short_prompt() -> None:
    engine = make_engine(max_num_batched_tokens=8)
    document = prompts_of(14, 1)[0] + [1] * 20
    engine.add_document("document", document)
    run(engine)
    engine.add_request("oldest", [5] * 20, greedy(1))
    engine.add_request("short", [6] * 10, greedy(1))
    engine.add_request("question", [*document, 7], greedy(1))
    outputs = engine.step()
    assert [output.request_id for output in outputs] == ["question"]
    run(engine)
    check_no_leak(engine)


def test_a_document_is_kept_to_its_end() -> None:
    engine, document = make_engine(), prompts_of(8, 1)[0] + [1] * 20
    output = engine.add_document("document", document)
    seen = []
    while engine.has_unfinished():
        engine.step()
        seen.append(engine.num_read("document"))
    assert output.finished
    assert seen == [*sorted(seen[:-1]), 0]
    question = [*document, 5]
    engine.add_request("question", question, greedy())
    output = run(engine)["question"]
    assert tokens_of(output) == alone(question)
    assert output.num_cached_tokens == len(document)
    before = engine.metrics().counts.prefill_tokens
    engine.add_document("again", document)
    run(engine)
    assert engine.metrics().counts.prefill_tokens == before
    with pytest.raises(ValueError, match="enable_prefix_caching"):
        make_engine(enable_prefix_caching=False).add_document("document", document)
    check_no_leak(engine)


@pytest.mark.parametrize("length", [1, 2, 17, 33])
def test_log_probabilities_of_prompt_and_answer(length) -> None:
    engine, prompt = make_engine(), (prompts_of(9, 1)[0] * 5)[:length]
    for i in range(2):  # the second could hit the cache
        engine.add_request(str(i), prompt, greedy(prompt_logprobs=2, logprobs=1))
        output = run(engine)[str(i)]
        with torch.no_grad():
            logits = model_of()(torch.tensor([[*prompt, *tokens_of(output)]])).logits[0]
        expected = logits.double().log_softmax(-1)
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == length
        for place in range(1, length):
            found = output.prompt_logprobs[place][prompt[place]]
            assert abs(found.logprob - expected[place - 1, prompt[place]]) < 1e-4
        for place, token in enumerate(tokens_of(output)):
            found = output.outputs[0].logprobs[place][token]
            assert abs(found.logprob - expected[length - 1 + place, token]) < 1e-4
            assert found.rank == 1
    check_no_leak(engine)


@pytest.mark.parametrize("kind", ["hybrid", "delta", "interleaved"])
def test_drafts_change_nothing(kind) -> None:
    """Prompts that repeat themselves, so that some drafts are right and some are wrong."""
    engine = make_engine(model_of(kind), speculative={"method": "prompt_lookup", "num_tokens": 3})
    prompts = [[*prompt, *prompt[:8], *prompt[:4]] for prompt in prompts_of(10, 3, longest=14)]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, greedy(16))
        engine.add_request(f"drawn {i}", prompt, drawn(i))
    outputs = run(engine)
    for i, prompt in enumerate(prompts):
        assert tokens_of(outputs[str(i)]) == alone(prompt, 16, kind)
    assert engine.metrics().counts.drafts_proposed
    plain = make_engine(model_of(kind))
    for i, prompt in enumerate(prompts):
        plain.add_request(f"drawn {i}", prompt, drawn(i))
    for name, output in run(plain).items():
        assert tokens_of(output) == tokens_of(outputs[name])
    check_no_leak(engine)


def test_equal_schedules_give_equal_answers() -> None:
    answers = []
    for _ in range(2):
        engine = make_engine(seed=3)
        for i, prompt in enumerate(prompts_of(11, 6)):
            engine.add_request(str(i), prompt, SamplingParams(max_tokens=6, logprobs=0))
        outputs = run(engine)
        answers.append([(tokens_of(output), output.outputs[0].cumulative_logprob) for output in outputs.values()])
    assert answers[0] == answers[1]
