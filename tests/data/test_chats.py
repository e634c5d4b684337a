"""A line to a conversation: every form gives the same messages, and every field is honoured, refused or named."""

from __future__ import annotations

import json

import pytest

from oncelm.data.chats import read_chat

CHAT = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def chat(**record):
    return read_chat(json.dumps(record).encode())


def answer(**fields) -> dict:
    """A line whose answer has those fields."""
    return {"messages": [CHAT[0], {**CHAT[1], **fields}]}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": CHAT},
        {"conversations": [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]},
        {"conversations": CHAT},
        {"messages": [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "Four."}]},
        {"prompt": "Two and two?", "response": "Four."},
        {"prompt": "Two and two?", "answer": "Four."},
        {"prompt": "Two and two?", "completion": "Four."},
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"question": "Two and two?", "answer": "Four."},
        {"question": "Two and two?", "response": "Four."},
        {"instruction": "Two and two?", "input": "", "output": "Four."},
        {"instruction": "Two and two?", "context": "", "response": "Four."},
        {"prompt": "Two and two?", "response": "Four.", "system": None, "tools": [], "label": True, "rejected": None},
        answer(weight=1, train=True, training=True, loss=1.0, name=None, tool_calls=None, mask=None),
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Two and "}, {"type": "text", "text": "two?"}]},
                CHAT[1],
            ]
        },
    ],
    ids=str,
)
def test_every_form_gives_the_same_messages(record: dict) -> None:
    found = chat(**record)
    assert found.messages == CHAT
    assert found.learned == [1]
    assert not found.unread
    assert found.tools is None


def test_an_instruction_has_its_input_behind_it() -> None:
    assert chat(instruction="Add.", input="2 2", output="4").messages[0]["content"] == "Add.\n\n2 2"
    assert chat(instruction="Add.", context="2 2", response="4").messages[0]["content"] == "Add.\n\n2 2"


@pytest.mark.parametrize("field", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("no", [0, False, 0.0])
def test_an_answer_that_is_not_to_be_learned_is_only_read(field: str, no) -> None:
    found = chat(messages=[CHAT[0], {**CHAT[1], field: no}, *CHAT])
    assert found.messages == CHAT * 2
    assert found.not_learned == {1}
    assert found.learned == [3]


def test_answers_in_a_prompt_are_only_read() -> None:
    found = chat(prompt=[*CHAT, CHAT[0]], completion=CHAT[1:])
    assert found.messages == CHAT * 2
    assert found.learned == [3]


@pytest.mark.parametrize("field", ["system", "system_prompt"])
@pytest.mark.parametrize(
    "record", [{"messages": CHAT}, {"conversations": CHAT}, {"prompt": "Two and two?", "completion": "Four."}]
)
def test_the_system_beside_is_the_first_message(field: str, record: dict) -> None:
    system = {"role": "system", "content": "Be brief."}
    assert chat(**record, **{field: "Be brief."}).messages == [system, *CHAT]
    assert chat(messages=[system, *CHAT], **{field: "Be brief."}).messages == [system, *CHAT]
    with pytest.raises(ValueError, match=f"{field}: more than one message of the system, and they differ"):
        chat(messages=[system, *CHAT], **{field: "Be long."})


def test_history_stands_before_the_question_behind_the_system() -> None:
    found = chat(instruction="b?", output="two", system="Be brief.", history=[["a?", "one"]])
    assert [message["content"] for message in found.messages] == ["Be brief.", "a?", "one", "b?", "two"]
    assert found.learned == [2, 4]
    assert chat(prompt="a", response="b", history=[]).messages[0]["content"] == "a"


def test_tools_and_calls_are_kept_for_the_template() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    quoted = {**call, "function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [
        CHAT[0],
        {"role": "assistant", "content": None, "tool_calls": [quoted]},
        {"role": "tool", "content": "", "tool_call_id": "1", "name": "add"},
        CHAT[1],
    ]
    found = chat(messages=messages, tools=[TOOL])
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert found.messages[2] == {"role": "tool", "content": "", "tool_call_id": "1", "name": "add"}
    assert found.tools == chat(messages=messages, tools=json.dumps([TOOL])).tools == [TOOL]
    assert not found.unread


def test_what_nobody_knows_is_named() -> None:
    found = chat(messages=[{**CHAT[0], "time": 1}, {**CHAT[1], "time": 2}], id=7, source=None, prompt="Two and two?")
    assert found.messages == CHAT
    assert found.unread == ("id", "messages[].time", "prompt")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (answer(weight=0.5), r"messages\[1\]\.weight is 0\.5; allowed: 0 or false"),
        (answer(train="no"), r"messages\[1\]\.train is 'no'; allowed"),
        (answer(weight=1, train=False), "weight and train contradict each other"),
        ({"messages": [{**CHAT[0], "train": True}, CHAT[1]]}, r"messages\[0\]\.train is True; only the assistant's"),
        *(
            (answer(**{field: 0}), rf"messages\[1\]\.{field} changes what the line means")
            for field in ("mask", "ignore")
        ),
        (answer(loss_mask=[1]), r"messages\[1\]\.loss_mask changes what the line means"),
        (answer(function_call={"name": "add"}), "function_call changes what the line means: write tools"),
        (answer(content=None, refusal="No."), r"messages\[1\] must have role and content"),
        (answer(content=[{"type": "image_url", "image_url": "x"}]), r"content\[0\] is .*only text is learned here"),
        (answer(content=[]), "content must be text that is not empty"),
        (answer(tool_calls="add"), r"messages\[1\]\.tool_calls must be a list"),
        ({"messages": CHAT, "tools": "add"}, "tools must be a list of JSON objects, got 'add'"),
        ({"messages": CHAT, "weight": 0}, "weight of a line is 0"),
        ({"messages": CHAT, "train": False}, "train of a line is False"),
        ({"messages": CHAT, "loss_mask": [0, 1]}, "loss_mask changes what the line means"),
        ({"messages": CHAT, "images": ["a.png"]}, "images changes what the line means"),
        ({"messages": CHAT, "functions": [TOOL]}, "functions changes what the line means"),
        ({"messages": CHAT, "history": [["a", "b"]]}, "history is read beside a question and its answer only"),
        ({"prompt": "a", "completion": "b", "label": False}, "label of a line is False"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "chosen changes what the line means: preferences"),
        ({"chosen": CHAT, "rejected": CHAT}, "chosen changes what the line means"),
        ({"prompt": "a", "response": "b", "history": ["a"]}, "history must be a list of"),
        ({"prompt": "a", "question": "b", "response": "c"}, "prompt and question: which one is meant"),
        ({"prompt": "a", "response": "b", "output": "c"}, "response and output: which one is meant"),
        ({"question": "a", "context": "b", "answer": "c"}, "context is read beside instruction only"),
        ({"prompt": "a", "response": "b", "system": ["c"]}, r"system must be text that is not empty, got \['c'\]"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_what_changes_the_meaning_is_refused_by_name(record: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        chat(**record)


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
def test_a_malformed_line_says_why(line: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_chat(line.encode())


def test_numbers_that_json_lacks_cost_nothing() -> None:
    line = json.dumps({"prompt": "NaN?", "response": "Infinity", "score": float("nan"), "rest": [float("-inf")]})
    found = read_chat(line.encode())
    assert [message["content"] for message in found.messages] == ["NaN?", "Infinity"]
