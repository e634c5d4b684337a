"""What cannot be asked for is said at once, with what can."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest

from oncelm.engine.params import SamplingParams

NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temprature": 1}, "did you mean 'temperature'"),
        ({"max_new_tokens": 5}, "here it is max_tokens"),
        ({"n": 0}, "n must be a whole number of at least 1, got 0"),
        ({"n": True}, "n must be a whole number"),
        ({"max_tokens": 0}, "max_tokens must be a whole number of at least 1"),
        ({"max_tokens": 4, "min_tokens": 5}, r"min_tokens must be at most max_tokens \(4\), got 5"),
        ({"temperature": -0.1}, "temperature must be a number of at least 0"),
        ({"temperature": NAN}, "temperature must be"),
        ({"temperature": "hot"}, "temperature must be"),
        ({"top_k": -2}, "top_k must be"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1"),
        ({"min_p": 1.5}, "min_p must be a number from 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty must be a number above 0"),
        ({"presence_penalty": 3}, "presence_penalty must be a number from -2 to 2"),
        ({"seed": 2**64}, "seed must be at most"),
        ({"stop": [""]}, "stop.*must be text"),
        ({"stop": 3}, "stop must be text, or a list"),
        ({"stop": "a", "detokenize": False}, "set detokenize=True"),
        ({"stop_token_ids": 5}, "stop_token_ids must be a list"),
        ({"logprobs": -2}, "logprobs must be"),
        ({"logprobs": True}, "logprobs must be"),
        ({"logit_bias": {"a": 1}}, "logit_bias: a token id must be"),
        ({"logit_bias": {3: NAN}}, r"logit_bias\[3\] must be a finite number"),
        ({"allowed_token_ids": []}, "allowed_token_ids must hold at least one value"),
        ({"bad_words": "word"}, "bad_words must be a list"),
        ({"logits_processors": [3]}, "logits_processors must be a list of functions"),
        ({"structured": "{"}, "structured as text must be a JSON schema"),
        ({"structured": ["a"]}, "structured must be a JSON schema"),
        ({"structured": {"choice": []}}, "must hold at least one value"),
        ({"structured": {"regex": "a", "choice": ["b"]}}, "stands alone"),
        ({"structured": {"regex": 3}}, "must be text"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false"),
    ],
)
def test_what_is_not_allowed(options, said) -> None:
    with pytest.raises(ValueError, match=said):
        SamplingParams(**options)


def test_what_is_allowed_is_kept_in_one_form() -> None:
    params = SamplingParams(
        n=3, temperature=0, stop="a", stop_token_ids=[1, 2], logit_bias={4: 1}, structured='{"type": "object"}', seed=-1
    )
    assert (params.stop, params.stop_token_ids, params.logit_bias) == (("a",), (1, 2), {4: 1.0})
    assert params.structured == {"type": "object"}
    assert SamplingParams(stop=None, max_tokens=None).stop is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 4
    for same in (copy.deepcopy(params), pickle.loads(pickle.dumps(params)), dataclasses.replace(params)):
        assert same == params
    with pytest.raises(ValueError, match="n must be"):
        dataclasses.replace(params, n=0)


def test_token_ids_of_other_models() -> None:
    SamplingParams(stop_token_ids=[9], logit_bias={9: 1.0}, allowed_token_ids=[9]).check_model(10, True)
    for options in ({"stop_token_ids": [10]}, {"logit_bias": {10: 1.0}}, {"allowed_token_ids": [3, 10]}):
        with pytest.raises(ValueError, match=f"{next(iter(options))}: the model has 10 tokens .0 to 9., got 10"):
            SamplingParams(**options).check_model(10, True)


def test_what_needs_a_tokenizer() -> None:
    for options in ({"stop": "a"}, {"bad_words": ["a"]}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} needs a tokenizer"):
            SamplingParams(**options).check_model(10, False)


def test_which_requests_need_no_more_than_the_largest_logit() -> None:
    assert SamplingParams(
        temperature=0, stop="a", top_p=0.5, max_tokens=5, seed=3, logprobs=1, prompt_logprobs=1
    ).takes_likeliest
    for options in (
        {"temperature": 1.0},
        {"min_tokens": 1},
        {"repetition_penalty": 1.1},
        {"logit_bias": {1: 1.0}},
        {"allowed_token_ids": [1]},
        {"bad_words": ["a"]},
        {"logits_processors": [lambda prompt, output, logits: logits]},
        {"structured": {}},
    ):
        assert not SamplingParams(**{"temperature": 0} | options).takes_likeliest
