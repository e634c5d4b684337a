"""A line of a conversation file to messages: every field is used, refused by name, or listed in a warning.

A line is one JSON object, in any of these forms:

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
    {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]}
    {"prompt": ..., "response": ...}        prompt, question or instruction; response, answer, completion or output;
                                            prompt and completion may be lists of messages

Other fields:

    system, system_prompt               of a line: its first message
    tools                               of a line: what the assistant can call, for the chat template
    input, context; history             beside instruction: text behind it; [[question, answer], ...] before it
    weight, train, training, loss       of a message: 0 or false where an answer is not to be learned
    name, tool_calls, reasoning, ...    of a message: for the chat template (`PASSED_ON`)

A field that is null counts as missing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from oncelm.data.reading import parse_record
from oncelm.utils.errors import printable

ROLES = ("system", "user", "assistant", "developer", "tool", "function")
QUESTIONS = ("prompt", "question", "instruction")
ANSWERS = ("response", "answer", "completion", "output")
# Of a message, for the chat template; `oncelm.data.templates` refuses those that it does not write.
PASSED_ON = ("name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning", "thinking")
LEARNED = ("weight", "train", "training", "loss")
_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}  # names of ShareGPT's "from"
_RESULTS = ("tool", "function")  # roles whose text may be empty: a tool may return nothing

_USE_WEIGHT = "say what is not learned by weight: 0 of a message"
_ONLY_TEXT = "only text is learned here"
_REFUSED = {  # fields that change what a line means, and what to do about them
    "chosen": "preferences are not learned here; write the answer to learn as prompt and response",
    "rejected": "preferences are not learned here; write the answer to learn as prompt and response",
    "mask": _USE_WEIGHT,
    "masked": _USE_WEIGHT,
    "masks": _USE_WEIGHT,
    "ignore": _USE_WEIGHT,
    "loss_mask": _USE_WEIGHT,
    "loss_masks": _USE_WEIGHT,
    "loss_scale": _USE_WEIGHT,
    "loss_weight": _USE_WEIGHT,
    "train_detail": _USE_WEIGHT,
    "training_detail": _USE_WEIGHT,
    "train_on_inputs": _USE_WEIGHT,
    "labels": _USE_WEIGHT,
    "functions": "write tools and tool_calls, the newer form",
    "function_call": "write tools and tool_calls, the newer form",
    "documents": "write them into the messages",
    "chat_template": "set it as the tokenizer's",
    "chat_template_kwargs": "set the tokenizer's chat template as it is to be",
    "image": _ONLY_TEXT,
    "images": _ONLY_TEXT,
    "video": _ONLY_TEXT,
    "videos": _ONLY_TEXT,
    "audio": _ONLY_TEXT,
    "audios": _ONLY_TEXT,
    "refusal": "write it as the content",
}

Message = dict[str, Any]  # role, content and what is PASSED_ON


@dataclass(frozen=True)
class Chat:
    """A conversation, in OpenAI's form."""

    messages: list[Message]
    not_learned: frozenset[int] = frozenset()  # numbers of the answers that are only read
    tools: list[dict[str, Any]] | None = None
    unread: tuple[str, ...] = ()  # fields that mean nothing here

    @property
    def answers(self) -> list[int]:
        """Numbers of the assistant's messages."""
        return [number for number, message in enumerate(self.messages) if message["role"] == "assistant"]

    @property
    def learned(self) -> list[int]:
        return [number for number in self.answers if number not in self.not_learned]


def read_chat(line: bytes) -> Chat:
    """The conversation of one line; ValueError says what is wrong with it."""
    record = parse_record(line)
    if not isinstance(record, dict):
        raise ValueError(f"a JSON object is needed, got {type(record).__name__}")
    reader = _Reader(record)
    messages = reader.messages()
    chat = Chat(messages, tools=reader.tools, unread=tuple(sorted(reader.unread)))
    if not chat.answers:
        raise ValueError("no message of the assistant: there would be nothing to learn")
    only_read = (number for number in chat.answers if id(chat.messages[number]) in reader.only_read)
    return replace(chat, not_learned=frozenset(only_read))


def read_messages(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> Chat:
    """The conversation that a model is asked to answer; ValueError says what is wrong with it."""
    given = [dict(message) if isinstance(message, Mapping) else message for message in messages]
    record: dict[str, Any] = {"messages": given} if tools is None else {"messages": given, "tools": [*tools]}
    reader = _Reader(record)
    return Chat(reader.messages(), tools=reader.tools, unread=tuple(sorted(reader.unread)))


class _Reader:
    """Takes a record's fields one by one; what is left in the end is unread."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.rest = _present(record)
        self.unread: set[str] = set()
        self.only_read: set[int] = set()  # by `id`
        _refuse(self.rest)
        _check_whole(self.rest)
        self.tools = _tools(self.rest.pop("tools", None))

    def messages(self) -> list[Message]:
        if "messages" in self.rest:
            messages = self._listed("messages")
        elif "conversations" in self.rest:
            messages = self._listed("conversations")
        else:
            messages = self._pair()
        if "history" in self.rest:
            raise ValueError("history is read beside a question and its answer only; put it into the messages")
        messages = self._system(messages)
        self.unread.update(self.rest)
        return messages

    def _listed(self, field: str) -> list[Message]:
        listed = self.rest.pop(field)
        if not isinstance(listed, list) or not listed:
            raise ValueError(f"{field} must be a list of messages, got {listed!r:.60}")
        return [self._message(message, field, number) for number, message in enumerate(listed)]

    def _message(self, value: Any, field: str, number: int) -> Message:
        name = f"{field}[{number}]"
        rest = _present(value) if isinstance(value, dict) else {}
        from_value = "role" not in rest and ("from" in rest or field == "conversations")
        role_key, text_key = ("from", "value") if from_value else ("role", "content")
        if role_key not in rest or (text_key not in rest and "tool_calls" not in rest):
            raise ValueError(f"{name} must have {role_key} and {text_key}, got {value!r:.60}")
        role = rest.pop(role_key)
        role = _SHAREGPT.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise ValueError(f"{name} has {role_key} {role!r}; allowed: {', '.join(ROLES)}")
        _refuse(rest, f"{name}.")
        may_be_empty = role in _RESULTS or "tool_calls" in rest
        message = {"role": role, "content": _content(rest.pop(text_key, ""), f"{name}.{text_key}", may_be_empty)}
        if not _is_learned(rest, name, role):
            self.only_read.add(id(message))
        for passed in PASSED_ON:
            if (given := rest.pop(passed, "")) not in ("", []):
                check = _tool_calls if passed == "tool_calls" else _text
                message[passed] = check(given, f"{name}.{passed}")
        self.unread.update(f"{field}[].{key}" for key in rest)
        return message

    def _pair(self) -> list[Message]:
        """Question and answer, with what stands before and behind the question."""
        asked, told = ([field for field in fields if field in self.rest] for fields in (QUESTIONS, ANSWERS))
        if not asked or not told:
            raise ValueError(
                f"neither messages nor conversations nor prompt and response (or {', '.join(QUESTIONS[1:])}; "
                f"{', '.join(ANSWERS[1:])}) among its keys ({', '.join(map(printable, self.rest))[:60]})"
            )
        for fields in (asked, told):
            if len(fields) > 1:
                raise ValueError(f"{' and '.join(fields)}: which one is meant? Leave the others out")
        question, answer = asked[0], told[0]
        messages = self._side(question, "user")
        self.only_read.update(map(id, messages))
        for field in ("input", "context"):
            text = self.rest.pop(field, "")
            if text and question != "instruction":
                raise ValueError(f"{field} is read beside instruction only; put it into the {question}")
            if text:
                messages[-1]["content"] += "\n\n" + _text(text, field)
        return self._history() + messages + self._side(answer, "assistant")

    def _side(self, field: str, role: str) -> list[Message]:
        """One side of a pair: a text, or the messages that make it up."""
        if field in ("prompt", "completion") and isinstance(self.rest[field], list):
            return self._listed(field)
        return [{"role": role, "content": _text(self.rest.pop(field), field)}]

    def _history(self) -> list[Message]:
        messages = []
        turns = self.rest.pop("history", [])
        if not isinstance(turns, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in turns):
            raise ValueError(f"history must be a list of [question, answer], got {turns!r:.60}")
        for number, turn in enumerate(turns):
            for role, text in zip(("user", "assistant"), turn, strict=True):
                messages.append({"role": role, "content": _text(text, f"history[{number}]")})
        return messages

    def _system(self, messages: list[Message]) -> list[Message]:
        """The messages, behind the system's that stands beside them."""
        given = {field: self.rest.pop(field) for field in ("system", "system_prompt") if field in self.rest}
        said = {_text(text, field) for field, text in given.items() if text}
        first = [messages[0]["content"]] if messages[0]["role"] == "system" else []
        if len(said.union(first)) > 1:
            raise ValueError(f"{' and '.join(given)}: more than one message of the system, and they differ")
        return messages if first else [*({"role": "system", "content": text} for text in said), *messages]


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _refuse(fields: dict[str, Any], where: str = "") -> None:
    for field, instead in _REFUSED.items():
        if field in fields and fields[field] not in ("", []):
            raise ValueError(f"{where}{field} changes what the line means: {instead}")


def _check_whole(fields: dict[str, Any]) -> None:
    """Takes what says that a whole line is to be learned; refuses what says that it is not, or not as others are."""
    for field in (*LEARNED, "label"):
        if field in fields and (value := fields.pop(field)) != 1:
            raise ValueError(f"{field} of a line is {value!r:.60}; allowed: 1 or true. Leave out other lines")


def _is_learned(fields: dict[str, Any], name: str, role: str) -> bool:
    """Takes the fields that say whether a message is learned."""
    said = {field: fields.pop(field) for field in LEARNED if field in fields}
    for field, value in said.items():
        if value not in (0, 1):
            raise ValueError(f"{name}.{field} is {value!r:.60}; allowed: 0 or false (not learned), 1 or true (learned)")
        if value and role != "assistant":
            raise ValueError(f"{name}.{field} is {value!r}; only the assistant's messages are learned: leave it out")
    if len({bool(value) for value in said.values()}) > 1:
        raise ValueError(f"{name}: {' and '.join(said)} contradict each other")
    return all(said.values())


def _content(value: Any, name: str, may_be_empty: bool) -> str:
    """A text, or a list of parts that join to one."""
    if isinstance(value, list) and value:
        for number, part in enumerate(value):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"{name}[{number}] is {part!r:.60}; {_ONLY_TEXT}: parts of type text, with a text")
        value = "".join(part["text"] for part in value)
    return "" if may_be_empty and value in ("", []) else _text(value, name)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} must be text that is not empty, got {value!r:.60}")
    return value


def _tools(value: Any) -> list[dict[str, Any]] | None:
    """A list of tools, or one as the text of its JSON."""
    given = _unquoted(value)
    if given in (None, "", []):
        return None
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise ValueError(f"tools must be a list of JSON objects, got {value!r:.60}")
    return given


def _tool_calls(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise ValueError(f"{name} must be a list of JSON objects, got {value!r:.60}")
    return [_call(call) for call in value]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    """A call whose arguments, text in OpenAI's form, are the object that chat templates write."""
    changed = dict(call)
    if isinstance(arguments := _unquoted(call.get("arguments")), dict):
        changed["arguments"] = arguments
    if isinstance(function := call.get("function"), dict):
        changed["function"] = _call(function)
    return changed


def _unquoted(value: Any) -> Any:
    """What JSON that is kept as text says; other values as they are."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
