"""Damaged files beside a model and of other kinds: tokenizers, params.json, result files, conversations, corpora."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oncelm
from oncelm.bench.report import read_records
from oncelm.data.conversations import read_conversations
from oncelm.data.layout import find_corpus
from oncelm.data.prepare import prepare
from oncelm.data.tokens import open_tokens
from oncelm.eval import TASKS, LanguageModel, make_task, read_run, run, write_report
from oncelm.models.yoco.official import write_official
from tests.fuzz.guard import JUNK, NUMBERS, damaged_dict, damaged_text, draws, guarded
from tests.models.small import make_model

pytestmark = pytest.mark.slow
FOLDER = Path(mkdtemp(prefix="fuzz-"))


@cache
def tokenizer_folder() -> Path:
    folder = FOLDER / "tokenizer"
    oncelm.load_tokenizer("bytes").save_pretrained(folder)
    return folder


@draws(150)
@given(data=st.data())
def test_tokenizer_config_json(data) -> None:
    file = tokenizer_folder() / "tokenizer_config.json"
    text = file.read_text()
    try:
        if data.draw(st.booleans()):
            file.write_bytes(data.draw(damaged_text(text)))
        else:
            keys = [
                "chat_template",
                "model_max_length",
                "padding_side",
                "added_tokens_decoder",
                "auto_map",
                "pad_token",
            ]
            file.write_text(json.dumps(data.draw(damaged_dict(json.loads(text), keys))))
        with guarded():
            tokenizer = oncelm.load_tokenizer(file.parent)
            tokenizer.decode(tokenizer("the sea").input_ids)
    finally:
        file.write_text(text)


@cache
def official_folder() -> Path:
    folder = FOLDER / "official"
    write_official(make_model("retention"), folder)
    return folder


@draws(200)
@given(data=st.data())
def test_params_json(data) -> None:
    file = official_folder() / "params.json"
    text = file.read_text()
    try:
        if data.draw(st.booleans()):
            file.write_bytes(data.draw(damaged_text(text)))
        else:
            file.write_text(json.dumps(data.draw(damaged_dict(json.loads(text), ["sliding_window", "max_seq_len"]))))
        with guarded():
            assert oncelm.load(file.parent, "cpu")(torch.tensor([[5, 6]])).logits.shape[-1] == 61
    finally:
        file.write_text(text)


@cache
def result_text() -> str:
    file = FOLDER / "passkey.jsonl"
    model = LanguageModel(make_model("retention", vocab_size=300), oncelm.load_tokenizer("bytes"), "m")
    run(make_task(TASKS["passkey"], lengths=(400, 500), trials=2), model, file, beyond_trained_length=True)
    return file.read_text()


@draws(250)
@given(damage=st.deferred(lambda: damaged_text(result_text())))
def test_result_files(damage) -> None:
    file = FOLDER / "damaged.jsonl"
    file.write_bytes(damage)
    with guarded():
        write_report([read_run(file)], FOLDER / "report.html")
    with guarded():
        read_records(file)


CHAT = {"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "one"}]}
PAIR = {"prompt": "a?", "response": "one"}


@draws(300)
@given(data=st.data())
def test_conversations(data) -> None:
    file = FOLDER / "chats.jsonl"
    lines = [json.dumps(CHAT).encode()]
    record = data.draw(st.sampled_from([CHAT, PAIR]))
    if data.draw(st.booleans()):
        lines.append(data.draw(damaged_text(json.dumps(record))))
    else:
        keys = ["weight", "conversations", "instruction", "output", "system", "tools", "history", "input"]
        lines.append(json.dumps(data.draw(damaged_dict(record, keys))).encode())
        lines.append(json.dumps({"messages": data.draw(JUNK)}).encode())
        lines.append(json.dumps({"messages": [data.draw(damaged_dict(CHAT["messages"][1], ["train"]))]}).encode())
    file.write_bytes(b"\n".join(lines) + b"\n")
    with guarded():
        read_conversations(file, oncelm.load_tokenizer("bytes"), 100)


@cache
def corpus() -> Path:
    folder = FOLDER / "corpus"
    (folder / "json").mkdir(parents=True)
    (folder / "a.txt").write_text("the sea is deep\n" * 20)
    (folder / "json" / "a.json").write_text('["a.txt"]')
    (folder / "json" / "train.json").write_text('[{"name": "a", "weight": 1}]')
    return folder


@draws(150)
@given(data=st.data())
def test_listings_of_a_corpus(data) -> None:
    source = data.draw(damaged_dict({"name": "a", "weight": 1}, ["files"]))
    listing = [data.draw(st.sampled_from([source, {"name": "a", "weight": data.draw(st.sampled_from(NUMBERS))}]))]
    text = json.dumps(listing)
    file = corpus() / "json" / data.draw(st.sampled_from(["train.json", "valid.json"]))
    file.write_bytes(data.draw(st.just(text.encode()) | damaged_text(text)))
    try:
        with guarded():
            find_corpus(corpus())
    finally:
        (corpus() / "json" / "valid.json").unlink(missing_ok=True)
        (corpus() / "json" / "train.json").write_text('[{"name": "a", "weight": 1}]')


@cache
def manifest_text() -> str:
    return (
        prepare(find_corpus(corpus()), oncelm.load_tokenizer("bytes"), FOLDER / "tokens") / "tokens.json"
    ).read_text()


@draws(150)
@given(damage=st.deferred(lambda: damaged_text(manifest_text())))
def test_prepared_tokens_and_their_manifest(damage) -> None:
    manifest_text()
    (FOLDER / "tokens" / "tokens.json").write_bytes(damage)
    with guarded():
        open_tokens(FOLDER / "tokens")
    with guarded():
        prepare(find_corpus(corpus()), oncelm.load_tokenizer("bytes"), FOLDER / "tokens")
