"""An answer ends where HFLM ends it: at special tokens, across the borders of tokens, within a character."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

pytest.importorskip("lm_eval")
pytest.importorskip("peft")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from oncelm import load_tokenizer
from oncelm.eval import Generate, LanguageModel, Task, run
from oncelm.eval.harness.adapter import OnceLM
from tests.eval.conftest import SHAPE
from tests.models.small import make_long, make_model

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot_id|>"]
PROMPT = "<|im_start|>user\nOk?<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "Yes, née 漢.<|eot_id|>So<|im_end|>\n<|im_start|>user\nMore?<|im_end|>\n"
KINDS = ("retention", "window", "longllama", "llama")


def chat_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.split_special_tokens = False
    return tokenizer


def fitted(kind: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A small model that has learned the conversation by heart."""
    size = len(tokenizer)
    if kind == "llama":
        torch.manual_seed(0)
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": size}))
    elif kind == "longllama":
        model = make_long(vocab_size=size, max_position_embeddings=64, last_context_length=64, eos_token_id=None)
    else:
        model = make_model(kind, vocab_size=size, eos_token_id=None, max_position_embeddings=4096)
    ids = torch.tensor([tokenizer.encode(PROMPT + ANSWER, add_special_tokens=False)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(200):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.02:
            break
    return model.eval()


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    tokenizer = chat_tokenizer()
    return {kind: LanguageModel(fitted(kind, tokenizer), tokenizer, kind) for kind in KINDS}


def ask(lm: OnceLM | HFLM, **options) -> str:
    request = Instance("generate_until", {}, arguments=(PROMPT, options), idx=0, metadata=("t", 0, 1))
    return lm.generate_until([request], disable_tqdm=True)[0]


OPTIONS = [
    ({"until": ["<|im_end|>"]}, "Yes, née 漢.So"),
    ({"until": ["<|eot_id|>"]}, "Yes, née 漢."),
    ({"until": "<|eot_id|>"}, "Yes, née 漢."),
    ({"until": ["<|im_start|>", "<|im_end|>"]}, "Yes, née 漢.So"),
    ({"until": ["So<|im_end|>"]}, "Yes, née 漢.So"),  # a special token with text beside it ends, but is not cut off
    ({"until": ["eot"]}, "Yes, née 漢."),  # within a special token
    ({"until": ["née"]}, "Yes, "),  # é is two tokens
    ({"until": ["漢."]}, "Yes, née "),
    ({"until": [".S"]}, "Yes, née 漢"),  # text on both sides of a special token
    ({"until": ["s,", "e"]}, "Y"),
    ({"until": ["\n\n", "\nuser"]}, "Yes, née 漢.So"),  # cut off, though a special token stands between
    ({"until": []}, "Yes, née 漢.So\nuser\nMor"),
    ({}, "Yes, née 漢.So\nuser\nMor"),
    ({"until": ["née"], "max_gen_toks": 5}, "Yes, "),
    ({"until": ["z"], "max_gen_toks": 7}, "Yes, n\ufffd"),  # within é
    ({"until": ["z"], "max_new_tokens": 1}, "Y"),
    ({"until": ["z"], "max_tokens": 3, "do_sample": None}, "Yes"),
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_stops(kind, models) -> None:
    model = models[kind]
    ours = OnceLM(model, 100)
    theirs = HFLM(pretrained=model.model, tokenizer=model.codec.tokenizer, batch_size=1, max_length=100)
    for options, expected in OPTIONS:
        asked = {"max_gen_toks": 28, "do_sample": False, **options}
        if {"max_new_tokens", "max_tokens"} & options.keys():
            del asked["max_gen_toks"]
        assert ask(ours, **asked) == expected, options
        assert ask(theirs, **asked) == expected, options


@pytest.mark.slow
def test_an_end_of_text_that_is_not_special_stays(models) -> None:
    """As in HFLM's answers."""
    model = models["retention"]
    ends = model.codec.tokenizer.encode("S")
    before, model.model.generation_config.eos_token_id = model.model.generation_config.eos_token_id, ends
    try:
        theirs = HFLM(pretrained=model.model, tokenizer=model.codec.tokenizer, batch_size=1, max_length=100)
        for lm in (OnceLM(model, 100), theirs):
            assert ask(lm, until=["z"], max_gen_toks=28, do_sample=False) == "Yes, née 漢.S"
    finally:
        model.model.generation_config.eos_token_id = before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "answer"), [("<|im_end|>", "Yes, née 漢.So"), ("née", "Yes, "), ("", "Yes, née 漢.So\nuser\nMor")]
)
def test_stops_of_our_own_tasks(stop, answer, models, tmp_path) -> None:
    model = models["longllama"]

    class Asked(Task):
        name, summary = "asked", "one question"

        def options(self):
            return {}

        def examples(self, codec, seed):
            yield Generate(np.array(codec.tokenizer.encode(PROMPT), np.int32), "Yes", 28, stop)

        def score(self, example, output):
            return {"right": 1.0}

    done = run(Asked(), model, tmp_path / "run.jsonl")
    assert done.samples[0]["output"] == answer


def test_no_stops_given_as_none(language_models) -> None:
    """HFLM fails there."""
    lm = OnceLM(language_models("retention"), max_length=40)
    asked = [ask_args(until) for until in (None, [], [""])]
    assert len({lm.generate_until([one], disable_tqdm=True)[0] for one in asked}) == 1


def ask_args(until) -> Instance:
    options = {"until": until, "max_gen_toks": 12, "do_sample": False}
    return Instance("generate_until", {}, arguments=("abc", options), idx=0, metadata=("t", 0, 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"until": ["a", 3]}, r"until must be a text or a list of texts, got \['a', 3\]"),
        ({"num_beams": 4}, "num_beams=4"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2"),
        ({"max_gen_toks": 0}, "max_gen_toks must be a whole number of at least 1, got 0"),
    ],
)
def test_what_would_be_ignored_is_refused(options, message, language_models) -> None:
    lm = OnceLM(language_models("retention"), max_length=40)
    request = Instance("generate_until", {}, arguments=("abc", options), idx=0, metadata=("t", 0, 1))
    with pytest.raises(ValueError, match=message):
        lm.generate_until([request], disable_tqdm=True)
