"""LongLLaMA and a model of transformers through the same engine, one request at a time."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import oncelm
from oncelm.engine.params import SamplingParams
from tests.models.small import VOCAB, make_long

PROMPTS = [[5], [7, 8, 9] * 15, [7, 8, 9, 11]]  # within a window, over several, and one that begins alike


@cache
def model_of(kind: str) -> Any:
    if kind == "longllama":
        return make_long()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=VOCAB, **sizes, max_position_embeddings=64, eos_token_id=None)
    return LlamaForCausalLM(config).eval()


def alone(kind: str, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model_of(kind).generate(ids, max_new_tokens=count, **options)[0, len(prompt) :].tolist()


def open_llm(kind: str, **options: Any) -> oncelm.LLM:
    return oncelm.LLM(model_of(kind), **{"verbose": False} | options)


@pytest.mark.parametrize("kind", ["longllama", "transformers"])
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_answers_are_those_of_generate(kind, runs_ahead) -> None:
    llm = open_llm(kind)
    llm.engine.returns_at_launch = runs_ahead
    params = SamplingParams(temperature=0, max_tokens=12, n=2, ignore_eos=True, logprobs=1)
    for prompt, output in zip(PROMPTS, llm.generate(PROMPTS, params, use_tqdm=False), strict=True):
        for answer in output.outputs:
            assert answer.token_ids == alone(kind, prompt, 12)
            assert answer.finish_reason == "length"
            assert len(answer.logprobs) == 12
    assert llm.metrics().counts.finished == {"length": 6}
    assert llm.engine.pages.num_used == llm.engine.slots.num_used == 0


@pytest.mark.parametrize("kind", ["longllama", "transformers"])
def test_nothing_stays_of_a_request_that_was_aborted(kind) -> None:
    llm = open_llm(kind, max_num_batched_tokens=8, max_num_seqs=8)
    for steps in (1, 3, 8):
        llm.engine.add_request("gone", PROMPTS[1], SamplingParams(max_tokens=12, ignore_eos=True))
        for _ in range(steps):
            llm.engine.step()
        llm.engine.abort_request("gone")
        params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
        (output,) = llm.generate(PROMPTS[2], params, use_tqdm=False)
        assert output.outputs[0].token_ids == alone(kind, PROMPTS[2], 6)


def test_log_probabilities_of_a_prompt() -> None:
    prompt = PROMPTS[1]
    llm = open_llm("transformers", max_num_batched_tokens=8, max_num_seqs=8)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    expected = model_of("transformers")(torch.tensor([prompt])).logits[0].log_softmax(-1)
    first, *others = output.prompt_logprobs
    assert first is None
    for place, found in enumerate(others):
        token = prompt[place + 1]
        assert found[token].logprob == pytest.approx(expected[place, token].item(), abs=1e-5)


def test_what_cannot_be_had_is_refused_by_name(capsys) -> None:
    with pytest.raises(ValueError, match="prompt_logprobs is not for LongLLaMA models"):
        open_llm("longllama").generate([5, 6], SamplingParams(prompt_logprobs=1), use_tqdm=False)
    for name, value in {
        "speculative": {"method": "prompt_lookup"},
        "cache_dir": "kept",
        "cpu_cache_bytes": 1,
        "page_size": 16,
        "kv_cache_bytes": 2**20,
    }.items():
        with pytest.raises(ValueError, match=rf"{name}=.* LlamaForCausalLM runs requests one at a time"):
            open_llm("transformers", **{name: value})
    with pytest.raises(ValueError, match="a document cannot be kept: LlamaForCausalLM runs requests one at a time"):
        open_llm("transformers").read([5, 6, 7])
    with pytest.raises(ValueError, match="dtype"):
        open_llm("transformers", kv_cache_dtype="float8")
    assert capsys.readouterr().err == ""
    open_llm("transformers", verbose=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "LlamaForCausalLM runs requests one at a time: only YOCO models keep what they read in pages."


def test_length_is_the_models_own_or_what_was_asked_for() -> None:
    assert open_llm("transformers").engine.plan.max_model_len == 64
    assert open_llm("transformers", max_model_len=100).engine.plan.max_model_len == 100
    assert open_llm("longllama").engine.plan.max_model_len == 2**20
    with pytest.raises(ValueError, match="at most 63 fit"):
        open_llm("transformers").generate([[5] * 64], use_tqdm=False)
