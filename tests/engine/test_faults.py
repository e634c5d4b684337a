"""What goes wrong is said of the request that it happens to: all others answer as ever, and no memory is lost."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from oncelm.data.tokenizers import load_tokenizer
from oncelm.engine.engine import Engine
from oncelm.engine.llm import LLM
from oncelm.engine.options import EngineOptions
from oncelm.engine.params import SamplingParams
from oncelm.engine.pool import Pool
from oncelm.engine.sampler import Sampler
from oncelm.engine.text import TextState
from oncelm.models.yoco import model as network
from tests.engine.answers import answer, prompts, tiny_model
from tests.engine.schedules import Life, draw_schedule, run_schedule
from tests.models.small import VOCAB, make_model

NAME = "hybrid"


def make_engine(model: Any = None, tokenizer: Any = None, **options: Any) -> Engine:
    """Of a tiny model, with memory for 4 requests of 64 tokens at once and 4 snapshots."""
    model = model or tiny_model(NAME)
    settings = {"max_model_len": 64, "max_num_seqs": 4, "page_size": 4, "num_snapshots": 4, "verbose": False, **options}
    memory = 66 * Pool.page_bytes(model.config, settings["page_size"], model.dtype)
    memory += 9 * Pool.slot_bytes(model.config, model.dtype)
    return Engine(model, tokenizer, EngineOptions(**{"kv_cache_bytes": memory, **settings}))


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0, "max_tokens": 6, **options})


def finish(engine: Engine) -> dict[str, Any]:
    """The last output of each request."""
    outputs: dict[str, Any] = {}
    for _ in range(2000):
        if not engine.has_unfinished():
            return outputs
        outputs |= {output.request_id: output for output in engine.step()}
    raise AssertionError("it waits for ever")


def check_empty(engine: Engine) -> None:
    engine.close()
    assert engine.pages.num_used == engine.slots.num_used == 0


def check_answer(output: Any, text: tuple[int, ...], name: str = NAME) -> None:
    for one in output.outputs:
        assert one.finish_reason in ("stop", "length"), one.error
        assert tuple(one.token_ids) == answer(name, text).tokens[: len(one.token_ids)]


# -- memory that runs out ---------------------------------------------------------------------------------------------

PLACES: tuple[tuple[Any, str], ...] = (
    (network, "swiglu"),
    (Sampler, "choose"),
    (Sampler, "read"),
    (Pool, "copy_slot"),
    (Pool, "copy_page"),
    (Pool, "read_rows"),
    (Pool, "write_rows"),
)


def fail_sometimes(
    monkeypatch: pytest.MonkeyPatch, draw: random.Random, error: Callable[[], BaseException], places: Any = PLACES
) -> None:
    """Let functions that take memory raise at random calls."""

    def failing(function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            if draw.random() < 0.02:
                raise error()
            return function(*args, **kwargs)

        return call

    for where, name in places:
        monkeypatch.setattr(where, name, failing(getattr(where, name)))


class ShortOfMemory(Life):
    """In its steps memory runs out now and then."""

    may_fail = True

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.draw = random.Random(self.schedule.seed)

    def step(self) -> list[Any]:
        with pytest.MonkeyPatch.context() as patch:
            fail_sometimes(patch, self.draw, lambda: torch.OutOfMemoryError("out of memory, says the test"))
            return super().step()


@pytest.mark.parametrize("block", range(2))
def test_memory_that_runs_out_within_a_step(block) -> None:
    """At any call of any pass, while much else goes on: an answer fails, or is right; the engine lives on."""
    failed = 0
    for seed in range(6 * block, 6 * block + 6):
        failed += run_schedule(draw_schedule(seed, (NAME, "retention", "window"), 5), ShortOfMemory).failed
    assert failed > 0


def test_the_largest_request_fails_where_memory_runs_out(monkeypatch) -> None:
    texts = [prompts(NAME, which) for which in range(5)]
    short, long = min(texts, key=len), max(texts, key=len)
    engine = make_engine()
    engine.add_request("short", short, greedy())
    engine.add_request("long", long, greedy())
    calls: list[int] = []

    def once(x: torch.Tensor, gate: torch.Tensor, original: Callable = network.swiglu) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory, says the test")
        return original(x, gate)

    monkeypatch.setattr(network, "swiglu", once)
    outputs = finish(engine)
    check_answer(outputs["short"], short)
    assert outputs["long"].outputs[0].finish_reason == "error"
    assert "memory" in outputs["long"].outputs[0].error
    check_empty(engine)


@pytest.mark.parametrize("error", [RuntimeError("something else"), KeyboardInterrupt()])
def test_an_error_that_nobody_expects_is_raised_and_leaves_a_sound_engine(monkeypatch, error) -> None:
    """Whoever goes on after it gets right answers, or is told that they failed."""
    texts = [prompts(NAME, which) for which in range(5)]
    for seed in range(4):
        engine, outputs = make_engine(), {}
        for which, text in enumerate(texts):
            engine.add_request(str(which), text, greedy())
        with monkeypatch.context() as patch:
            fail_sometimes(patch, random.Random(seed), lambda: error, PLACES[:2])
            try:
                while engine.has_unfinished():
                    outputs |= {output.request_id: output for output in engine.step()}
            except type(error):
                pass
        outputs |= finish(engine)
        for which, text in enumerate(texts):
            one = outputs[str(which)].outputs[0]
            if one.finish_reason == "error":
                assert one.error
            else:
                check_answer(outputs[str(which)], text)
        check_empty(engine)


# -- clients that leave -----------------------------------------------------------------------------------------------


def test_a_client_leaves_at_any_moment() -> None:
    stays, leaves = prompts(NAME, 0), prompts(NAME, 1)
    for moment in range(0, 16, 2):
        engine = make_engine(max_num_batched_tokens=6, max_num_seqs=2)
        engine.add_request("stays", stays, greedy())
        engine.add_request("leaves", leaves, greedy(n=2))
        outputs: dict[str, Any] = {}
        for _ in range(moment):
            outputs |= {output.request_id: output for output in engine.step()}
        engine.abort_request("leaves")
        engine.abort_request("leaves")  # a second time, and one that nobody knows
        engine.abort_request("nobody")
        outputs |= finish(engine)
        check_answer(outputs["stays"], stays)
        assert outputs["leaves"].finished
        for one in outputs["leaves"].outputs:
            assert tuple(one.token_ids) == answer(NAME, leaves).tokens[: len(one.token_ids)]
        check_empty(engine)


# -- numbers that are none --------------------------------------------------------------------------------------------


def test_tokens_whose_path_is_not_finite(monkeypatch) -> None:
    """Requests that read such a token fail alone, and what they read is given to nobody: neither as a snapshot nor in
    pages that others use later."""
    bad = 60
    model = copy.deepcopy(tiny_model(NAME))
    with torch.no_grad():
        model.embed_tokens.weight[bad] = float("nan")
    fine = [
        text for text in (prompts(NAME, which) for which in range(30)) if bad not in (*text, *answer(NAME, text).tokens)
    ]
    assert len(fine) > 5
    engine = make_engine(model, max_num_batched_tokens=8, snapshot_interval=3)
    outputs: dict[str, Any] = {}
    for turn in range(2):
        for which, text in enumerate(fine[:4]):
            engine.add_request(f"fine {turn} {which}", text, greedy())
            engine.add_request(f"bad {turn} {which}", (*text[: 3 + which], bad, *text), greedy(n=1 + which % 2))
        outputs |= finish(engine)
    for name, output in outputs.items():
        kind, _, which = name.split()
        if kind == "fine":
            check_answer(output, fine[int(which)])
        else:
            assert {one.finish_reason for one in output.outputs} == {"error"}
            assert "finite" in output.outputs[0].error
            assert not output.outputs[0].token_ids
    assert engine.cache is not None
    for snapshot in engine.cache.tree:
        if snapshot.slot:
            kept = {**engine.pool.read_slot(snapshot.slot), **engine.pool.read_rows(snapshot.pages, 0, snapshot.n)}
            assert all(x.isfinite().all() for x in kept.values())
    check_empty(engine)


# -- prompts that cannot be -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([], "empty"),
        ([3, -1], "-1"),
        ([3, VOCAB], str(VOCAB)),
        ([3, 2**40], str(2**40)),
        ([3, 1.5], "1.5"),
        ([3, None], "None"),
        ([3, "a"], "a"),
        ([True, 3], "True"),
        ([[3, 4]], "3, 4"),
        ([3] * 64, "63"),
        ([3] * 100_000, "63"),
        ("text", "tokenizer"),
        (None, "prompt"),
        (7, "prompt"),
    ],
)
def test_prompts_that_cannot_be_are_refused(prompt, said) -> None:
    """At once, in words, and nothing of them stays."""
    engine = make_engine()
    with pytest.raises(ValueError, match=said):
        engine.add_request("x", prompt, greedy(max_tokens=1))
    assert not engine.has_unfinished()
    engine.add_request("x", [5, 6], greedy())  # the name is free
    check_answer(finish(engine)["x"], (5, 6))
    check_empty(engine)


def test_more_tokens_than_fit_are_refused_with_what_would() -> None:
    engine = make_engine()
    with pytest.raises(ValueError, match="max_tokens=4 would fit"):
        engine.add_request("x", [5] * 60, greedy(max_tokens=5))
    engine.add_request("x", [5] * 60, greedy(max_tokens=4))
    with pytest.raises(ValueError, match="in use"):
        engine.add_request("x", [5], greedy(max_tokens=4))
    finish(engine)
    check_empty(engine)


# -- very many --------------------------------------------------------------------------------------------------------


def count_calls(function: Callable) -> int:
    """Calls of Python functions and of built-in ones."""
    calls = [0]

    def count(frame: Any, event: str, arg: Any) -> None:
        calls[0] += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return calls[0]


def test_ten_thousand_requests_wait(monkeypatch) -> None:
    """A step costs the same whether ten or ten thousand wait, and all come to an end."""
    text, costs = prompts(NAME, 2)[:5], {}
    for waiting in (40, 10_000):
        engine = make_engine()
        for number in range(waiting):
            engine.add_request(str(number), text, greedy(max_tokens=2), priority=number % 3)
        steps = [count_calls(engine.step) for _ in range(4)]
        costs[waiting] = max(steps)
        assert engine.metrics().gauges.num_waiting >= waiting - 4 * 4
        order = list(range(waiting))
        random.Random(0).shuffle(order)
        for number in order[: waiting - 30]:
            engine.abort_request(str(number))
        outputs = finish(engine)
        for number in order[waiting - 30 :]:
            if str(number) in outputs:
                check_answer(outputs[str(number)], text)
        assert engine.metrics().counts.finished["abort"] >= waiting - 30 - 16
        check_empty(engine)
    assert costs[10_000] < 1.5 * costs[40], costs


# -- functions of the user --------------------------------------------------------------------------------------------


def test_a_logits_processor_that_raises_fails_its_own_request() -> None:
    def raises(prompt: Any, output: Any, logits: torch.Tensor) -> torch.Tensor:
        if len(output) == 2:
            raise KeyError("nothing like it")
        return logits

    engine, text = make_engine(), prompts(NAME, 3)
    engine.add_request("raises", text, greedy(logits_processors=[raises]))
    engine.add_request("fine", text, greedy())
    outputs = finish(engine)
    check_answer(outputs["fine"], text)
    failed = outputs["raises"].outputs[0]
    assert (failed.finish_reason, len(failed.token_ids)) == ("error", 2)
    assert "KeyError" in failed.error
    check_empty(engine)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("stop", [None, "never"])
def test_a_tokenizer_that_raises_fails_its_own_request(monkeypatch, stop, last) -> None:
    """In the middle of an answer, or at its last token."""
    append = TextState.append

    def raises(self: TextState, token: int) -> Any:
        if self._params.max_tokens == 5 and self.num_tokens == (4 if last else 2):
            raise UnicodeError("no such text")
        return append(self, token)

    monkeypatch.setattr(TextState, "append", raises)
    engine = make_engine(tokenizer=load_tokenizer("bytes"))
    text = next(one for one in (prompts(NAME, which) for which in range(30)) if len(answer(NAME, one).tokens) > 6)
    engine.add_request("raises", text, greedy(max_tokens=5, stop=stop))
    engine.add_request("fine", text, greedy())
    outputs = finish(engine)
    check_answer(outputs["fine"], text)
    assert outputs["raises"].finished
    failed = outputs["raises"].outputs[0]
    assert failed.finish_reason == "error"
    assert "UnicodeError: no such text" in failed.error
    check_empty(engine)


def test_a_chat_template_that_raises_leaves_nothing_behind() -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = "{{ raise_exception('only odd questions') }}"
    with LLM(make_model("retention", vocab_size=260), tokenizer, kv_cache_bytes=2**22, verbose=False) as llm:
        with pytest.raises(Exception, match="only odd questions"):
            llm.chat([{"role": "user", "content": "?"}], greedy())
        assert not llm.engine.has_unfinished()
        assert len(llm.generate("?", greedy(), use_tqdm=False)) == 1
