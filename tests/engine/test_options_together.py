"""Requests of all kinds, side by side in one engine, are answered as each is alone."""

from __future__ import annotations

import json
import random
import re
from functools import cache

import pytest

from oncelm import load_tokenizer
from oncelm.engine.llm import LLM
from oncelm.engine.outputs import RequestOutput
from oncelm.engine.params import SamplingParams
from tests.models.small import make_model

pytest.importorskip("llguidance")
TOKENIZER = load_tokenizer("bytes")
SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, 22]}}, "required": ["a"], "additionalProperties": False}
REQUESTS = [
    ("the sea " * 4, SamplingParams(max_tokens=30, seed=1)),
    ("abc " * 8, SamplingParams(max_tokens=30, seed=2, top_p=0.8, repetition_penalty=1.3, presence_penalty=0.5)),
    ("name", SamplingParams(max_tokens=40, seed=3, structured=SCHEMA, n=3)),
    ("once upon", SamplingParams(max_tokens=20, temperature=0, logprobs=2, prompt_logprobs=1, frequency_penalty=0.7)),
    ("x", SamplingParams(max_tokens=30, seed=4, stop=["ab", "x", "e"], min_tokens=3)),
    ("abcabcabc", SamplingParams(max_tokens=30, seed=5, bad_words=["a", "the"], logit_bias={100: 3.0}, top_k=20)),
    ("abababab", SamplingParams(max_tokens=20, temperature=0, allowed_token_ids=[101, 102, 103], ignore_eos=True)),
    ("ab" * 10, SamplingParams(max_tokens=50, structured={"regex": "(ab){9,}c"}, seed=9, temperature=2.0)),
]


def make_llm(**options) -> LLM:
    model = make_model("hybrid", vocab_size=len(TOKENIZER) + 4)
    model.generation_config.eos_token_id = TOKENIZER.eos_token_id
    settings = {"max_model_len": 100, "page_size": 4, "max_num_seqs": 4, "kv_cache_bytes": 2**22, "verbose": False}
    return LLM(model, TOKENIZER, **settings | options)


@cache
def alone(i: int) -> RequestOutput:
    prompt, params = REQUESTS[i]
    return make_llm().generate(prompt, params, use_tqdm=False)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"speculative": {"method": "prompt_lookup"}},
        {"kv_cache_bytes": 60_000, "max_num_batched_tokens": 16},
        {"max_num_seqs": 8, "enable_prefix_caching": False},
    ],
)
def test_side_by_side_as_alone(options) -> None:
    llm, order = make_llm(**options), list(range(len(REQUESTS)))
    random.Random(0).shuffle(order)
    prompts, params = zip(*(REQUESTS[i] for i in order), strict=True)
    for i, output in zip(order, llm.generate(prompts, params, use_tqdm=False), strict=True):
        for answer, right in zip(output.outputs, alone(i).outputs, strict=True):
            assert answer.error is None
            for name in ("token_ids", "text", "finish_reason", "stop_reason"):
                assert getattr(answer, name) == getattr(right, name)
            if answer.cumulative_logprob is not None:
                assert answer.cumulative_logprob == pytest.approx(right.cumulative_logprob, abs=1e-3)
    counts = llm.metrics().counts
    assert counts.drafts_accepted > 0 if "speculative" in options else counts.drafts_accepted == 0
    assert counts.preemptions > 0 if options.get("kv_cache_bytes") else counts.preemptions == 0


def test_answers_have_what_was_asked_for() -> None:
    for answer in alone(2).outputs:
        assert answer.finish_reason == "length" or json.loads(answer.text)["a"] in (1, 22)
    assert re.fullmatch("(ab){9,}c", alone(7).outputs[0].text)
    output = alone(3)
    assert output.prompt_logprobs[0] is None
    for token, table in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True):
        assert table[token].decoded_token == TOKENIZER.decode([token])
    assert all(len(table) >= 2 for table in output.outputs[0].logprobs)
    assert set(alone(6).outputs[0].text) <= set("abc")
    assert "a" not in alone(5).outputs[0].text
