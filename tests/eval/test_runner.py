"""A run: what it shares changes nothing, a kill loses nothing, what does not fit is told."""

from __future__ import annotations

import json
import multiprocessing
import time
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch

from oncelm import load_tokenizer
from oncelm.eval import TASKS, Generate, LanguageModel, Task, make_task, option, read_run, run, runner
from tests.eval.conftest import build
from tests.models.small import make_long

TIMES = ("read_seconds", "answer_seconds", "tokens_read")


def answers(done) -> list[dict]:
    samples = [done.samples[index] for index in sorted(done.samples)]
    return [{key: value for key, value in sample.items() if key not in TIMES} for sample in samples]


def needle(haystack: str, **options) -> Task:
    few = {"lengths": (400, 600), "depths": 4, "runs": 2, "max_new_tokens": 6}
    return make_task(TASKS["needle"], **{**few, "haystack": haystack, **options})


@pytest.mark.parametrize("kind", ["retention", "window", "llama", "mistral"])
def test_sharing_beginnings_changes_no_answer(kind, haystack, tmp_path, monkeypatch, language_models) -> None:
    model = language_models(kind)
    shared = run(needle(haystack), model, tmp_path / "shared.jsonl")
    monkeypatch.setattr(runner, "LOOK_AHEAD", 0)
    separate = run(needle(haystack), model, tmp_path / "separate.jsonl")
    assert answers(shared) == answers(separate)
    assert len(shared.samples) == 16
    read = [sum(s["tokens_read"] for s in done.samples.values()) for done in (shared, separate)]
    assert read[1] == sum(s["prompt_tokens"] for s in separate.samples.values())
    assert read[0] < 0.8 * read[1]  # one text, four depths, two runs


def test_writing_ends_when_the_verdict_cannot_change(haystack, tmp_path, language_models, monkeypatch) -> None:
    model = language_models("retention")
    written = run(needle(haystack), model, tmp_path / "all.jsonl")
    monkeypatch.setattr(TASKS["needle"], "decided", lambda self, example, text: len(text) >= 3)
    short = run(needle(haystack), model, tmp_path / "short.jsonl")
    for whole, cut in zip(written.samples.values(), short.samples.values(), strict=True):
        assert whole["output"].startswith(cut["output"])
        assert len(cut["output"]) == 3 < len(whole["output"])


def test_a_longllama_reads_every_text_in_one_go(haystack, tmp_path) -> None:
    """What goes to memory depends on where a part of the text ends, so that sharing would change its answers."""
    small = make_long(vocab_size=260, max_position_embeddings=64)
    small.generation_config.eos_token_id = None
    model = LanguageModel(small, load_tokenizer("bytes"), "long", {"memory": "cpu"}, {"last_context_length": 20})
    done = run(needle(haystack), model, tmp_path / "run.jsonl")
    examples = list(needle(haystack).examples(model.codec, 0))
    for example, sample in zip(examples, done.samples.values(), strict=True):
        assert sample["tokens_read"] == sample["prompt_tokens"] > 64
        row = torch.tensor(example.prompt, dtype=torch.long)[None]
        cache, written = small.new_cache(1, 700, memory="exact"), []
        logits = small.prefill(row, cache, last_context_length=20)
        for _ in range(example.max_new_tokens):
            written.append(int(logits[-1].argmax()))
            with torch.no_grad():
                logits = small(torch.tensor([[written[-1]]]), past_key_values=cache).logits[0]
        assert sample["output"] == model.codec.decode(written)
    assert done.configuration["model"]["memory"] == "cpu"


def test_a_finished_run_asks_nothing(haystack, tmp_path, language_models, monkeypatch) -> None:
    model, out = language_models("retention"), tmp_path / "run.jsonl"
    first = run(needle(haystack), model, out)
    assert first.complete
    before = out.read_bytes()
    monkeypatch.setattr(LanguageModel, "start", lambda self, n: pytest.fail("a model was asked"))
    assert answers(run(needle(haystack), model, out)) == answers(first)
    assert out.read_bytes() == before


def test_a_limited_run_goes_on(haystack, tmp_path, language_models) -> None:
    model = language_models("retention")
    whole = run(needle(haystack), model, tmp_path / "whole.jsonl")
    part = run(needle(haystack), model, tmp_path / "part.jsonl", limit=5)
    assert len(part.samples) == 5
    assert not part.complete
    assert answers(run(needle(haystack), model, tmp_path / "part.jsonl")) == answers(whole)


def test_after_kill_9_it_goes_on(haystack, tmp_path, language_models) -> None:
    out, model = tmp_path / "killed.jsonl", language_models("retention")

    def slowly() -> None:
        write = runner._write
        runner._write = lambda *asked: (time.sleep(0.2), write(*asked))[1]
        run(needle(haystack), model, out)

    process = multiprocessing.get_context("fork").Process(target=slowly)
    process.start()
    while not out.exists() or out.read_bytes().count(b"\n") < 4:
        assert process.is_alive(), "it ended before it was killed"
        time.sleep(0.02)
    process.kill()
    process.join()
    kept = read_run(out)
    assert 3 <= len(kept.samples) < 16
    resumed = run(needle(haystack), model, out)
    assert answers(resumed) == answers(run(needle(haystack), model, tmp_path / "whole.jsonl"))
    assert resumed.complete
    assert read_run(out).samples == resumed.samples


def test_another_seed_or_model_is_another_run(haystack, tmp_path, language_models) -> None:
    out = tmp_path / "run.jsonl"
    run(needle(haystack), language_models("retention"), out, limit=1)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="its seed is 0, this one's 1"):
        run(needle(haystack), language_models("retention"), out, seed=1)
    with pytest.raises(ValueError, match=r"its model\.name is 'retention', this one's 'llama'"):
        run(needle(haystack), language_models("llama"), out)
    with pytest.raises(ValueError, match=r"its options\.depths is 4, this one's 5"):
        run(needle(haystack, depths=5), language_models("retention"), out)
    assert out.read_bytes() == before


def test_changed_texts_are_another_run(haystack, tmp_path, language_models) -> None:
    out = tmp_path / "run.jsonl"
    run(needle(haystack), language_models("retention"), out, limit=2)
    with open(haystack, "r+") as file:
        file.write("Another beginning")
    with pytest.raises(ValueError, match="sample 0 has another prompt"):
        run(needle(haystack), language_models("retention"), out)
    assert len(read_run(out).samples) == 2


def test_too_long_for_the_model(haystack, tmp_path) -> None:
    model = build("retention")
    model.longest = 500
    out = tmp_path / "run.jsonl"
    with pytest.raises(ValueError, match=r"600 tokens is longer than retention was made for \(500"):
        run(needle(haystack), model, out)
    assert not out.exists()
    assert run(needle(haystack, runs=1), model, out, beyond_trained_length=True).complete


@dataclass(frozen=True)
class Growing(Task):
    """Prompts of 100, 200, ... tokens."""

    name: ClassVar[str] = "growing"
    summary: ClassVar[str] = ""
    steps: int = option(4, "prompts")

    def examples(self, codec, seed):
        for i in range(self.steps):
            yield Generate(np.full(100 * (i + 1), 70, np.int32), "x", 2, tags={"step": i})

    def score(self, example, output):
        return {"length": float(len(output))}


def test_what_cannot_be_asked_leaves_what_was(tmp_path, monkeypatch, language_models) -> None:
    model, out = build("retention"), tmp_path / "run.jsonl"
    model.longest = 302
    with pytest.raises(ValueError, match="402 tokens is longer"):
        run(Growing(), model, out)
    assert len(read_run(out).samples) == 3
    model.longest = None

    def full(*_):
        raise torch.OutOfMemoryError("full")

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "start", full)
        with pytest.raises(
            ValueError, match=r"out of memory at a text of 400 tokens; the 3 samples before it are kept"
        ):
            run(Growing(), model, out)
    assert run(Growing(), model, out).complete


def test_every_line_says_what_it_is(haystack, tmp_path, language_models) -> None:
    out = tmp_path / "run.jsonl"
    run(needle(haystack, runs=1, lengths=(400,)), language_models("retention"), out)
    header, *samples, end = [json.loads(line) for line in out.read_text().splitlines()]
    assert header["configuration"]["task"] == "needle"
    assert header["environment"]["torch"] == torch.__version__
    assert header["configuration"]["model"]["weights"] == language_models("retention").model.fingerprint()
    for sample in samples:
        assert {"prompt_hash", "prompt_tokens", "tags", "target", "output", "scores"} < sample.keys()
    assert end["samples"] == len(samples) == 4
