"""What lm-eval gets from our adapter is what it gets from its own HFLM."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval")
pytest.importorskip("peft")

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from oncelm import load_tokenizer
from oncelm.eval import LanguageModel
from oncelm.eval.harness.adapter import OnceLM
from oncelm.eval.harness.scoring import score_requests
from oncelm.eval.harness.tree import Request

PAIRS = [
    ("Question: where?\nAnswer:", " here"),
    ("Question: where?\nAnswer:", " there it is"),
    ("Question: where?\nAnswer: ", "there"),  # white space moves to the continuation
    ("Question: where?\nAnswer:", " here"),
    ("", "no context"),
    ("x" * 120, " cut on the left"),
    ("x" * 120, " cut elsewhere, as it is longer"),
    ("ä", "é漢"),
]  # fmt: skip


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, arguments=arguments[i], idx=i, metadata=("t", i, 1)) for i in range(len(arguments))]


@pytest.fixture(params=["retention", "window", "llama"])
def both(request, language_models) -> tuple[OnceLM, HFLM]:
    model = language_models(request.param)
    theirs = HFLM(pretrained=model.model, tokenizer=model.codec.tokenizer, batch_size=3, max_length=100)
    return OnceLM(model, max_length=100), theirs


def test_loglikelihoods(both) -> None:
    ours, theirs = (lm.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True) for lm in both)
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine[0] == pytest.approx(expected[0], abs=1e-4)
        assert mine[1] == expected[1]


def test_rolling(both) -> None:
    texts = [("a b c",), ("long " * 60,), ("word " * 19,)]
    ours, theirs = (lm.loglikelihood_rolling(instances("r", texts), disable_tqdm=True) for lm in both)
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_generation(both) -> None:
    options = {"until": ["\n", "e"], "max_gen_toks": 12, "do_sample": False}
    asked = [(text, dict(options)) for text in ("abc", "abd", "The cat", "x" * 200)]
    both[1].batch_size_per_gpu = 1  # in a batch, HFLM writes on behind an end of text until all have come to theirs
    ours, theirs = (lm.generate_until(instances("generate_until", asked), disable_tqdm=True) for lm in both)
    assert ours == theirs


@pytest.mark.parametrize("keeps_text", [True, False])
def test_what_a_chat_template_writes_is_read_as_tokens(language_models, keeps_text) -> None:
    """Also by OnceLM's own tokenizers, which keep a typed </s> text."""
    model, tokenizer = language_models("retention"), load_tokenizer("bytes")
    tokenizer.split_special_tokens = keeps_text
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}Answer:"
    lm = OnceLM(LanguageModel(model.model, tokenizer, "chat"), max_length=200)
    end = tokenizer.eos_token_id
    assert (end in lm.tok_encode("a</s>b")) is not keeps_text
    chat = lm.apply_chat_template([{"role": "user", "content": "hi"}, {"role": "user", "content": "you"}])
    ids = lm.tok_encode(chat)
    assert ids == tokenizer(chat, split_special_tokens=False).input_ids
    assert ids.count(end) == 2
    context, continuation = lm._encode_pair(chat, " yes")
    assert (context, tokenizer.decode(continuation)) == (ids, " yes")
    asked = [(chat, " yes"), (chat, " no")]
    found = lm.loglikelihood(instances("loglikelihood", asked), disable_tqdm=True)
    requests = [Request(*(np.array(part, np.int32) for part in lm._encode_pair(*pair))) for pair in asked]
    assert found == score_requests(lm.model, lm.session, requests)


def test_refusals(language_models) -> None:
    lm = OnceLM(language_models("retention"), max_length=10)
    with pytest.raises(ValueError, match=r"continuation of 11 tokens is longer than retention reads \(10"):
        lm.loglikelihood(instances("loglikelihood", [("0123456789", "abcdefghijk")]), disable_tqdm=True)
    for pair, counts in ((("abc", ""), "3 and 0"), ((" ", "d"), "0 and 2")):  # white space moves to the continuation
        with pytest.raises(ValueError, match=f"a token of context and one to score, at least; it has {counts}"):
            lm.loglikelihood(instances("loglikelihood", [pair]), disable_tqdm=True)
    with pytest.raises(ValueError, match="greedy"):
        lm.generate_until(instances("g", [("a", {"do_sample": True, "temperature": 1.0})]), disable_tqdm=True)
    with pytest.raises(ValueError, match="room for 10"):
        lm.generate_until(instances("g", [("a", {"max_gen_toks": 10})]), disable_tqdm=True)
