"""Beams are those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from oncelm import load_tokenizer
from oncelm.engine.beam import BeamSearchParams
from oncelm.engine.llm import LLM
from tests.models.small import VOCAB, make_model


def make_llm(kind: str, eos: list[int], tokenizer: Any = None, **options: Any) -> LLM:
    model = make_model(kind, vocab_size=VOCAB if tokenizer is None else len(tokenizer))
    model.generation_config.eos_token_id = eos
    settings = {"max_model_len": 64, "page_size": 4, "kv_cache_bytes": 2**21, "max_num_seqs": 4, "verbose": False}
    return LLM(model, tokenizer, **settings | options)


@pytest.mark.parametrize(
    ("beam_width", "length_penalty", "early_stopping"),
    [(3, 1.0, False), (4, -0.5, True), (3, -0.5, "never"), (2, 2.5, "never"), (4, 2.5, False)],
)
def test_beams_are_those_of_transformers(beam_width, length_penalty, early_stopping) -> None:
    eos, reasons = list(range(5, VOCAB, 7)), set()
    llm = make_llm("hybrid", eos, enable_prefix_caching=beam_width > 2)
    prompts = torch.randint(VOCAB, (2, 5)).tolist()
    params = BeamSearchParams(beam_width, 7, length_penalty, early_stopping)
    for prompt, output in zip(prompts, llm.beam_search(prompts, params), strict=True):
        right = llm.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, 5), max_new_tokens=7, do_sample=False,
            num_beams=beam_width, num_return_sequences=beam_width, length_penalty=length_penalty,
            early_stopping=early_stopping, eos_token_id=eos, pad_token_id=1,
        )[:, 5:]  # fmt: skip
        assert output.prompt_token_ids == prompt
        for answer, tokens in zip(output.outputs, right.tolist(), strict=True):
            count = len(answer.token_ids)
            assert (answer.token_ids, tokens[count:]) == (tokens[:count], [1] * (len(tokens) - count))
            assert answer.finish_reason == ("stop" if tokens[count - 1] in eos else "length")
            reasons.add(answer.finish_reason)
    assert "stop" in reasons


def test_what_beams_have_in_common_is_read_once() -> None:
    llm = make_llm("retention", [])
    llm.beam_search(torch.randint(VOCAB, (1, 30)).tolist(), BeamSearchParams(4, 6))
    assert llm.metrics().counts.prefill_tokens == 29


def test_text_and_what_does_not_fit() -> None:
    tokenizer = load_tokenizer("bytes")
    llm = make_llm("retention", [tokenizer.eos_token_id], tokenizer)
    (output,) = llm.beam_search("to be", BeamSearchParams(2, 5))
    assert output.prompt == "to be"
    for answer in output.outputs:
        assert answer.text == tokenizer.decode(answer.token_ids, skip_special_tokens=True)
    with pytest.raises(ValueError, match=r"a prompt of 5 tokens and max_tokens=60 are more than the 64 that fit"):
        llm.beam_search("to be", BeamSearchParams(2, 60))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beam_width": 0}, "beam_width must be a whole number of at least 1, got 0"),
        ({"max_tokens": None}, "max_tokens must be"),
        ({"length_penalty": float("nan")}, "length_penalty must be a finite number"),
        ({"early_stopping": "nver"}, "did you mean 'never'"),
    ],
)
def test_what_is_not_allowed(options, said) -> None:
    with pytest.raises(ValueError, match=said):
        BeamSearchParams(**options)
