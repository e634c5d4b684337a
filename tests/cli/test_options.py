"""What verbs share: options, and what can be told from them before a model is read."""

from __future__ import annotations

import argparse
import json

import pytest

from oncelm import LongLlamaConfig, YocoConfig
from oncelm.cli import Parser
from oncelm.cli.options import SHARED, add_options, find_tokenizer, model_keys, session_options, token_counts


def parsed(*arguments: str) -> argparse.Namespace:
    parser = Parser(prog="oncelm test")
    add_options(parser, *SHARED)
    return argparse.Namespace(model="some/model", **vars(parser.parse(list(arguments))))


def test_memory_layers_are_keys_of_the_model() -> None:
    assert model_keys(parsed()) == {}
    assert model_keys(parsed("--mem-layers", "8, 16,24")) == {"mem_layers": [8, 16, 24]}
    for text in ("one", "8;16", "8,", "-1", ""):
        with pytest.raises(ValueError, match="--mem-layers: layer numbers with commas between, as in 8,16,24; got "):
            parsed("--mem-layers", text)


def test_options_of_memory_are_for_models_that_have_one() -> None:
    long, given = LongLlamaConfig(max_position_embeddings=64), ("--memory", "cpu", "--last-context-length", "64")
    options = {"cache_options": {"memory": "cpu"}, "read_options": {"last_context_length": 64}}
    assert session_options(long, parsed(*given)) == options
    assert session_options(YocoConfig(), parsed()) == {"cache_options": {}, "read_options": {}}
    for option in (given[:2], given[2:]):
        with pytest.raises(ValueError, match=f"{option[0]} is for LongLLaMA models, some/model is a model of type"):
            session_options(YocoConfig(), parsed(*option))
    with pytest.raises(ValueError, match="from 1 to the model's window of 64, got 65"):
        session_options(long, parsed("--last-context-length", "65"))


def test_the_tokenizer_is_the_one_that_is_named_or_the_models(tmp_path, monkeypatch) -> None:
    assert len(find_tokenizer("yoco-tiny", "bytes")) == 260
    with pytest.raises(ValueError, match="preset yoco-tiny has no tokenizer; name one"):
        find_tokenizer("yoco-tiny", None)
    with pytest.raises(ValueError, match=r"holds no tokenizer .* Name one with --tokenizer\."):
        find_tokenizer(str(tmp_path), None)
    for name in ("params.json", "checkpoint.pth"):  # an official folder
        (tmp_path / name).write_text(json.dumps({}))
    monkeypatch.setattr("oncelm.data.tokenizers._find_cl100k_ranks", lambda: "ranks")
    monkeypatch.setattr("oncelm.data.tokenizers._cl100k", lambda ranks: ranks)
    assert find_tokenizer(str(tmp_path), None) == "ranks"


def test_lengths() -> None:
    assert token_counts("4096,16K, 1M") == [4096, 16384, 1 << 20]
    with pytest.raises(ValueError, match="--lengths '4,x': each of them must be a whole number"):
        token_counts("4,x")
