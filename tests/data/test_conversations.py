"""Conversations to rows: what is cut, left out and unread is told, the same rows for the same step."""

from __future__ import annotations

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oncelm.data.conversations import ConversationDataset, pack, read_conversations
from oncelm.data.tokenizers import load_tokenizer


@pytest.fixture
def tokenizer():
    return load_tokenizer("bytes")


def write(file: Path, *records: dict) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def test_a_line_that_is_none_is_told_with_its_place(tmp_path, tokenizer) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n\n{"prompt": "a", "response": 4}\n')
    with pytest.raises(ValueError, match=r"chats\.jsonl:3: response must be text"):
        read_conversations(file, tokenizer, 100)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path, tokenizer) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8-sig")
    (conversation,) = read_conversations(file, tokenizer, 100)
    assert conversation.where == f"{file}:1"


def test_nothing_to_read_is_an_error(tmp_path, tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match="no conversations at"):
        read_conversations(tmp_path / "none.jsonl", tokenizer, 100)
    with pytest.raises(ValueError, match=r"holds no \.jsonl or \.jsonl\.gz or \.jsonl\.zst file"):
        read_conversations(tmp_path, tokenizer, 100)


def test_every_file_of_a_folder_is_read_or_named(tmp_path, tokenizer, caplog) -> None:
    folder, elsewhere = tmp_path / "chats", tmp_path / "elsewhere"
    write(folder / "a.jsonl", {"prompt": "a", "response": "one"})
    write(folder / "more" / "b.jsonl", {"prompt": "a", "response": "two"})
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a", "response": "three"}\n'))
    write(elsewhere / "d.jsonl", {"prompt": "a", "response": "four"})
    (folder / "linked").symlink_to(elsewhere)
    write(folder / "e.json", {"prompt": "a", "response": "five"})
    found = read_conversations(folder, tokenizer, 100)
    learned = [tokenizer.decode(one.tokens[one.answer], skip_special_tokens=True) for one in found]
    assert learned == ["one", "three", "four", "two"]
    assert "1 with the suffix .json (e.json)" in caplog.text


def test_a_damaged_file_is_named(tmp_path, tokenizer) -> None:
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress(b'{"prompt": "a", "response": "three"}\n')[:-9])
    with pytest.raises(ValueError, match=r"a\.jsonl\.gz: the file is damaged"):
        read_conversations(file, tokenizer, 100)


def test_unread_fields_are_counted_and_named_once(tmp_path, tokenizer, caplog) -> None:
    chat = [{"role": "user", "content": "a", "time": 3}, {"role": "assistant", "content": "b", "time": 4}]
    file = write(tmp_path / "a.jsonl", {"messages": chat, "id": 1}, {"prompt": "a", "response": "b", "id": 2})
    read_conversations(file, tokenizer, 100)
    assert [record.message for record in caplog.records] == [
        "fields that are not read: id (2 lines), messages[].time (1 lines)"
    ]


UNMARKED = (
    "{% for m in messages %}{{ m.content }}{% if false %}{% generation %}{% endgeneration %}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("record", "template", "size", "reason"),
    [
        (
            {"prompt": "a" * 99, "response": "b"},
            None,
            40,
            "1 left out: no answer remains in the first seq_len=40 tokens",
        ),
        ({"prompt": "a", "response": "b"}, UNMARKED, 40, "1 left out: the tokenizer's chat template marks no answer"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
            None,
            40,
            r"1 left out: no answer is to be learned, as its weight \(train, loss\) says",
        ),
        (None, None, 40, "every line is blank"),
    ],
    ids=["long", "unmarked", "weight", "blank"],
)
def test_the_error_says_why_none_is_left(tmp_path, tokenizer, record, template, size, reason) -> None:
    tokenizer.chat_template = template
    file = write(tmp_path / "a.jsonl", *([record] if record else []))
    with pytest.raises(ValueError, match=rf"holds no conversation to learn from \({reason}\)"):
        read_conversations(file, tokenizer, size)


def test_long_ones_are_cut_and_left_out_where_no_answer_remains(tmp_path, tokenizer, caplog) -> None:
    file = tmp_path / "chats.jsonl"
    lines = [{"prompt": "a", "response": "b" * 99}, {"prompt": "a" * 99, "response": "b"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    kept = read_conversations(file, tokenizer, 40)
    assert [(len(one.tokens), Path(one.where).name) for one in kept] == [(40, "chats.jsonl:1")]
    assert "2 conversations are longer than seq_len=40 tokens and are cut; 1 are left out" in caplog.text


@given(st.lists(st.integers(1, 20), max_size=60))
def test_packing_keeps_all_and_overfills_none(lengths: list[int]) -> None:
    rows = pack(lengths, 20)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    assert all(sum(lengths[item] for item in row) <= 20 for row in rows)
    assert len(rows) <= 2 * -(-sum(lengths) // 20)


@pytest.fixture
def dataset(tmp_path, tokenizer) -> ConversationDataset:
    file = tmp_path / "chats.jsonl"
    lines = [{"prompt": "a" * (i % 7 + 1), "response": "b" * (i % 5 + 1)} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, lines)))
    return ConversationDataset(read_conversations(file, tokenizer, 80), 80, pad_id=1, seed=3)


def test_rows_are_a_pure_function_of_the_step(dataset, tmp_path, tokenizer) -> None:
    again = ConversationDataset(read_conversations(tmp_path / "chats.jsonl", tokenizer, 80), 80, pad_id=1, seed=3)
    for step in (7, 0, 3):
        whole, part = again.batch(step, 4), dataset.batch(step, 4, slice(1, 3))
        assert torch.equal(part.tokens, whole.tokens[1:3])
        assert torch.equal(part.labels, whole.labels[1:3])
        assert part.lengths == whole.split(1)[1].lengths + whole.split(1)[2].lengths
    assert not torch.equal(dataset.batch(0, 4).tokens, dataset.batch(1, 4).tokens)


def test_an_epoch_has_every_conversation_once(dataset) -> None:
    rows = len(dataset._train)
    for epoch in range(2):
        names = [name for row in range(rows) for name in dataset.describe(epoch * rows + row).split(", ")]
        assert sorted(names) == sorted(one.where for one in dataset.conversations[:38])


def test_targets_are_answers_and_borders_are_conversations(dataset, tokenizer) -> None:
    batch = dataset.batch(0, 3)
    assert batch.num_targets == dataset.num_targets(0, 3)
    tokens, labels, borders = batch.tokens.flatten(), batch.labels.flatten(), batch.cu_seqlens.tolist()
    assert borders[0] == 0
    assert borders[-1] == 240
    for start, end in pairwise(borders):
        learned = labels[start:end][labels[start:end] != -100]
        text = tokenizer.decode(tokens[start:end])
        if text.startswith("User:"):
            assert tokenizer.decode(learned) == text.partition("Assistant:\n")[2]
        else:
            assert set(tokens[start:end].tolist()) == {1}
            assert not len(learned)


def test_validation_is_the_end(dataset) -> None:
    (batch,) = dataset.validation_batches(4)
    assert batch.tokens.shape == (1, 80)
    assert batch.num_targets > 0
    assert sum(batch.lengths) == 80
