"""Answers have the structure that was asked for, whatever the model writes."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch

from oncelm.engine.params import SamplingParams
from oncelm.engine.places import Memo, SamplingRow
from oncelm.engine.sampler import Sampler
from oncelm.engine.structured import Grammar, Grammars
from oncelm.engine.text import TextState
from tests.data.test_detokenize import TOKENIZERS

pytest.importorskip("llguidance")
CPU = torch.device("cpu")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "size": {"enum": [1, 22]}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


def grammars(kind: str, beyond: int = 0) -> Grammars:
    """Of a model whose vocabulary is larger than its tokenizer's, as padded ones are."""
    tokenizer = TOKENIZERS[kind]
    return Grammars(tokenizer, len(tokenizer) + beyond, [tokenizer.eos_token_id])


def written(kind: str, structured, seed: int, max_tokens: int = 80, **options) -> tuple[str, str | None]:
    """What a model of random logits writes, beside a row that writes anything; and why it ends."""
    tokenizer, beyond = TOKENIZERS[kind], 7
    params = SamplingParams(structured=structured, max_tokens=max_tokens, seed=seed, **options)
    grammar, size = grammars(kind, beyond)(params.structured), len(tokenizer) + beyond
    sampler = Sampler(size, CPU, tokenizer, [tokenizer.eos_token_id])
    text, output, memo = TextState(tokenizer, params, [], [tokenizer.eos_token_id], grammar=grammar), [], Memo()
    generator, finish = torch.Generator().manual_seed(seed), None
    while finish is None:
        logits = torch.randn(2, size, generator=generator)
        logits[0, tokenizer.eos_token_id] += 3
        rows = [
            SamplingRow(params, seed, len(output), [], output, grammar, memo=memo),
            SamplingRow(SamplingParams(), seed, len(output), [], output),
        ]
        found = sampler(logits, rows)
        assert found[0].error is None
        output.append(found[0].token)
        _, finish, _ = text.append(found[0].token)
    return text.text, finish


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_json(kind) -> None:
    ends = set()
    for seed in range(6):
        text, finish = written(kind, SCHEMA if seed % 2 else json.dumps(SCHEMA), seed, temperature=seed % 3)
        ends.add(finish)
        if finish == "stop":
            value = json.loads(text)
            assert set(value) == {"name", "size"}
            assert len(value["name"]) <= 5
            assert value["size"] in (1, 22)
    assert "stop" in ends


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_other_structures(kind) -> None:
    for seed in range(3):
        text, finish = written(kind, {"regex": "[a-d]{3}(é|日)+"}, seed)
        assert finish == "length" or re.fullmatch("[a-d]{3}(é|日)+", text)
        choices = ["yes", 'n"o', "p\\q\n", "é{1}"]
        assert written(kind, {"choice": choices}, seed)[0] in choices
        text, finish = written(kind, {"grammar": 'start: "(" (start | "x") ")"'}, seed)
        assert finish == "length" or re.fullmatch(r"\(+x\)+", text)
        text, finish = written(kind, {"grammar": 'root ::= "a" | "b" root'}, seed)  # as llama.cpp writes them
        assert finish == "length" or re.fullmatch("b*a", text)


def test_what_is_cut_off_is_the_beginning_of_something() -> None:
    text, finish = written("bytes", {"regex": "[ab]{40}"}, 0, max_tokens=30)
    assert finish == "length"
    assert re.fullmatch("[ab]{30}", text)


def test_drafts_are_looked_at_and_put_back() -> None:
    tokenizer = TOKENIZERS["bytes"]
    a, b, end = *tokenizer("ab").input_ids, tokenizer.eos_token_id
    grammar = grammars("bytes")({"regex": "ab*"})

    def allowed(*drafts: int) -> list[int]:
        bits = grammar.allowed(drafts).view("uint8")
        return [i for i in range(len(tokenizer)) if bits[i // 8] >> i % 8 & 1]

    assert allowed() == [a]
    assert allowed(a) == allowed(a, b, b) == [end, b]
    assert allowed(a, b, end) == [end]
    assert len(allowed(b)) == len(allowed(a, a)) == len(tokenizer)  # that draft is not accepted anyway
    assert allowed() == [a]
    grammar.accept(a)
    assert allowed() == [end, b]
    with pytest.raises(ValueError, match="does not fit the structure"):
        grammar.accept(a)


def test_answers_do_not_share_where_they_are() -> None:
    make = grammars("bytes")
    one, two = make({"choice": ["ab"]}), make({"choice": ["ab"]})
    one.accept(TOKENIZERS["bytes"]("a").input_ids[0])
    assert isinstance(two, Grammar)
    assert (one.allowed() != two.allowed()).any()


@pytest.mark.parametrize(
    ("structured", "said"),
    [
        ({"regex": "(["}, "this regex cannot be used.*unclosed"),
        ({"type": "nonsense"}, "this json_schema cannot be used.*nonsense"),
        ({"grammar": "start: foo"}, "this grammar cannot be used.*foo"),
        ({"type": "string", "not": {}}, "Unimplemented keys"),
    ],
)
def test_structures_that_cannot_be_followed(structured, said) -> None:
    with pytest.raises(ValueError, match=f"(?s){said}"):
        grammars("bytes")(structured)


def test_what_is_missing_is_named(monkeypatch) -> None:
    with pytest.raises(ValueError, match="end-of-text"):
        Grammars(TOKENIZERS["bytes"], 300, [])
    with pytest.raises(ValueError, match="fast tokenizer, got None"):
        Grammars(None, 300, [1])
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(ImportError, match=r"pip install 'oncelm\[structured\]'"):
        Grammars(TOKENIZERS["bytes"], 300, [2])


def test_a_structure_that_is_complete_may_end_before_min_tokens() -> None:
    assert written("bytes", {"choice": ["a"]}, 0, min_tokens=5) == ("a", "stop")
    text, _ = written("bytes", {"regex": "a*"}, 0, min_tokens=5)
    assert len(text) >= 5
