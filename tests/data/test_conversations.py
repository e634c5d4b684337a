"""Conversations to rows: every form read, the assistant's tokens alone as targets, the same rows for the same step."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oncelm.data.conversations import ConversationDataset, encode, pack, read_conversations, read_messages
from oncelm.data.tokenizers import load_tokenizer

CHAT = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}|"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
UNMARKED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    return load_tokenizer("bytes")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]},
        {"prompt": "Two and two?", "response": "Four."},
        {"prompt": "Two and two?", "answer": "Four."},
        {"prompt": "Two and two?", "completion": "Four."},
        {"question": "Two and two?", "answer": "Four."},
        {"instruction": "Two and two?", "input": "", "output": "Four."},
    ],
    ids=lambda record: "/".join(record),
)
def test_every_form_gives_the_same_messages(record: dict) -> None:
    assert read_messages(json.dumps(record).encode()) == CHAT


def test_an_instruction_has_its_input_behind_it() -> None:
    line = b'{"instruction": "Add.", "input": "2 2", "output": "4"}'
    assert read_messages(line)[0]["content"] == "Add.\n\n2 2"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "a JSON object is needed, got list"),
        ('{"text": "a"}', "neither messages nor conversations nor prompt and response"),
        ('{"messages": []}', "messages must be a list of messages"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\] must have role and content"),
        ('{"messages": [{"role": "bot", "content": "a"}]}', "has role 'bot'; allowed: system, user, assistant"),
        (
            '{"messages": [{"role": ["user"], "content": "a"}]}',
            r"has role \['user'\]; allowed: system, user, assistant",
        ),
        ('{"messages": [{"role": "user", "content": ""}]}', "content must be text that is not empty"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no message of the assistant"),
        ('{"prompt": "a", "response": 4}', "response must be text"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, tokenizer, line: str, reason: str) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"chats\.jsonl:3: .*{reason}"):
        read_conversations(file, tokenizer, 100)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path, tokenizer) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}\n', encoding="utf-8-sig")
    (conversation,) = read_conversations(file, tokenizer, 100)
    assert conversation.where == f"{file}:1"


def test_nothing_to_read_is_an_error(tmp_path, tokenizer) -> None:
    with pytest.raises(FileNotFoundError, match="no conversations at"):
        read_conversations(tmp_path / "none.jsonl", tokenizer, 100)
    with pytest.raises(ValueError, match=r"holds no \.jsonl file"):
        read_conversations(tmp_path, tokenizer, 100)


@pytest.mark.parametrize(
    ("template", "text", "answers"),
    [
        (None, "User:\nTwo and two?\n\nAssistant:\nFour.</s>", ["Four.</s>"]),
        (MARKED, "<user>Two and two?<assistant>Four.|", ["Four.|"]),
        (UNMARKED, "<user>Two and two?|<assistant>Four.|", ["Four.|"]),
    ],
    ids=["plain", "marked", "unmarked"],
)
def test_the_answer_alone_is_learned(tokenizer, template: str | None, text: str, answers: list[str]) -> None:
    tokenizer.chat_template = template
    tokens, answer = encode(CHAT, tokenizer)
    assert tokenizer.decode(tokens) == text
    assert [tokenizer.decode(tokens[answer])] == answers
    twice, answer = encode([{"role": "system", "content": "Be brief."}, *CHAT, *CHAT], tokenizer)
    assert tokenizer.decode(twice[answer]) == answers[0] * 2


def test_a_template_that_changes_what_came_before_is_refused(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + UNMARKED
    with pytest.raises(ValueError, match="mark the assistant's part"):
        encode(CHAT, tokenizer)


@pytest.mark.parametrize("rest", [MARKED, UNMARKED], ids=["marked", "unmarked"])
def test_a_conversation_that_the_template_refuses_is_named(tmp_path, tokenizer, rest: str) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}" + rest
    )
    file = tmp_path / "chats.jsonl"
    file.write_text("\n".join(json.dumps({"messages": messages}) for messages in (CHAT, [CHAT[0], *CHAT])))
    with pytest.raises(ValueError, match=r"chats\.jsonl:2: .*chat template .*: Roles must alternate"):
        read_conversations(file, tokenizer, 100)


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
        assert torch.equal(dataset.batch(step, 4), again.batch(step, 4))
        assert torch.equal(dataset.labels(step, 4, slice(1, 3)), again.labels(step, 4)[1:3])
    assert not torch.equal(dataset.batch(0, 4), dataset.batch(1, 4))


def test_an_epoch_has_every_conversation_once(dataset) -> None:
    rows = len(dataset._train)
    for epoch in range(2):
        names = [name for row in range(rows) for name in dataset.describe(epoch * rows + row).split(", ")]
        assert sorted(names) == sorted(one.where for one in dataset.conversations[:38])


def test_targets_are_answers_and_borders_are_conversations(dataset, tokenizer) -> None:
    tokens, labels = dataset.batch(0, 3).flatten(), dataset.labels(0, 3).flatten()
    borders = dataset.cu_seqlens(0, 3).tolist()
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
    assert batch.shape == (1, 80)
    assert (dataset.validation_labels(0, 4) != -100).sum() > 0
    assert dataset.validation_cu_seqlens(0, 4)[-1] == 80
