"""A byte order mark, which some editors put before UTF-8, is no part of any file that a user gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oncelm import load_tokenizer
from oncelm.bench.report import read_records
from oncelm.data.conversations import read_conversations
from oncelm.data.layout import find_corpus
from oncelm.data.reading import read_text
from oncelm.eval.documents import read_utf8
from oncelm.eval.harness.folder import read_questions
from oncelm.eval.tasks.in_context import Trec, WebQs, read_jsonl
from oncelm.models.yoco.official import read_params
from oncelm.train.config import TrainConfig

RECORD = '{"question": "Who?", "answers": ["I"]}\n'
MESSAGES = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
CHOICE = '{"query": "q", "choices": ["a", "b"], "gold": 0}\n'
WEBQS = json.dumps([{"utterance": "Who?", "targetValue": "(list (description I))"}])
SIZES = {
    "dim": 64,
    "hidden_dim": 64,
    "n_layers": 2,
    "n_self_heads": 2,
    "n_attn_heads": 2,
    "n_attn_kv_heads": 2,
    "vocab_size": 61,
}


def read_corpus(listing: Path) -> object:
    return find_corpus(str(listing.parent.parent)).train[0].name


def read_tokens(file: Path) -> list[int]:
    return read_conversations(file, load_tokenizer("bytes"), 99)[0].tokens.tolist()


READERS = {
    "text": ("a.txt", "text\n", read_text),
    "utf-8": ("a.txt", "text\n", read_utf8),
    "recipe": ("recipe.yaml", "data: here\nsteps: 5\n", TrainConfig.from_yaml),
    "conversations": ("a.jsonl", MESSAGES, read_tokens),
    "corpus": ("json/train.json", '[{"name": "a", "weight": 1}]', read_corpus),
    "in context": ("a.jsonl", RECORD, read_jsonl),
    "trec": ("a.label", "HUM:ind Who ?\n", lambda file: Trec(data=".").read(file)),
    "webqs": ("a.json", WEBQS, lambda file: WebQs(data=".").read(file)),
    "choices": ("a.jsonl", CHOICE, read_questions),
    "measurements": ("a.jsonl", '{"benchmark": "decode"}\n', read_records),
    "params": ("params.json", json.dumps(SIZES), lambda file: str(read_params(file.parent))),
}


@pytest.mark.parametrize("kind", READERS)
def test_a_byte_order_mark_changes_nothing(kind, tmp_path) -> None:
    name, content, read = READERS[kind]
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    if kind == "corpus":
        (tmp_path / "json" / "a.json").write_text('\ufeff["a.txt"]', encoding="utf-8")
        (tmp_path / "a.txt").write_text("text")
    file.write_text(content, encoding="utf-8")
    wanted = read(file)
    file.write_text("\ufeff" + content, encoding="utf-8")
    assert read(file) == wanted
