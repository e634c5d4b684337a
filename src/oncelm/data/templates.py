"""A conversation to tokens by the tokenizer's chat template, and which of them the assistant wrote.

    messages -> text, and spans of it to learn -> tokens [n], answer [n]

A template may mark the assistant's part, {% generation %} ... {% endgeneration %}; else it is what an answer adds to
the conversation before it. Without a template conversations are written plainly:

    "User:\\n" + text + "\\n\\n"        "System:\\n" + text + "\\n\\n"        "Assistant:\\n" + text + eos

The answer and the eos are learned, and nothing else. What a template leaves unwritten of a conversation is an error.

Tokenizers that keep text from becoming special tokens (`split_special_tokens`, as those of `oncelm.data.tokenizers`)
would do so to a template's own "</s>". For these, special tokens of the template become what they say, and the
messages' text stays text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import chain, pairwise
from typing import Any

import numpy as np
from jinja2 import Environment, TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from oncelm.data.chats import Chat, Message

Spans = list[tuple[int, int]]  # of characters, or tokens
_NEEDLESS = {"role", "content", "tool_call_id"}  # fields that need no check of their own


class Refused(ValueError):
    """The chat template does not take a conversation."""


def encode(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """A conversation's tokens, uint32 [n], and which of them are learned, [n] booleans.

    Raises:
        ValueError: the tokenizer's chat template refuses the conversation, leaves out a part of it, or does not show
            what the assistant wrote; without a template, a field that only one could write.
    """
    encoder = _encode_plainly if tokenizer.chat_template is None else _encode_by_template
    tokens, spans = encoder(chat, tokenizer)
    answer = np.zeros(len(tokens), dtype=bool)
    for start, end in spans:
        answer[start:end] = True
    return np.array(tokens, dtype=np.uint32), answer


def encode_question(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A conversation's tokens, ready for an answer of the assistant to follow.

    Raises:
        ValueError: the chat template refuses the conversation; without one, a field that only one could write.
    """
    if tokenizer.chat_template is None:
        tokens, _ = _encode_plainly(chat, tokenizer)
        return tokens + tokenizer.encode("Assistant:\n", add_special_tokens=False)
    specials = _specials(tokenizer)
    chat, stand_ins = _protect(chat, specials) if specials else (chat, {})
    text, _ = _write(chat, tokenizer, prompt=True)
    if not specials:
        return list(tokenizer(text, add_special_tokens=False).input_ids)
    try:
        spans = _added(chat, tokenizer, text)
    except ValueError:  # a template that writes earlier turns differently, such as without their reasoning
        spans = []
    return _tokens_in_pieces(text, spans, tokenizer, specials, stand_ins)[0]


def _encode_plainly(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], Spans]:
    for name, _ in _parts(chat):
        raise ValueError(f"only a chat template could write {name}, and the tokenizer has none; leave it out")
    tokens: list[int] = []
    spans: Spans = []
    learned = chat.learned
    for number, message in enumerate(chat.messages):
        name, is_answer = f"{message['role'].capitalize()}:\n", message["role"] == "assistant"
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        head, text = (tokenizer.encode(part, add_special_tokens=False) for part in (name, message["content"]))
        text += end if is_answer else tokenizer.encode("\n\n", add_special_tokens=False)
        tokens += head + text
        if number in learned:
            spans.append((len(tokens) - len(text), len(tokens)))
    return tokens, spans


def _encode_by_template(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], Spans]:
    specials = _specials(tokenizer)
    stand_ins: dict[str, str] = {}
    if specials:
        chat, stand_ins = _protect(chat, specials)
    marked = marks_answers(tokenizer.get_chat_template(tools=chat.tools))
    text, spans = _write(chat, tokenizer, marked=marked)
    _check_written(chat, tokenizer, text)
    spans = _marked(chat, spans) if marked else _added(chat, tokenizer, text)
    if specials:
        return _tokens_in_pieces(text, spans, tokenizer, specials, stand_ins)
    return (_tokens_with_offsets if marked else _tokens_by_turns)(text, spans, tokenizer)


def _specials(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The special tokens that a template has to be given, since the tokenizer itself keeps text from becoming any."""
    added = tokenizer.added_tokens_decoder.items() if tokenizer.split_special_tokens else ()
    return {token.content: index for index, token in added if token.special}


@cache
def marks_answers(template: str) -> bool:
    """Whether a chat template has the tag {% generation %}: not in a comment, and not as a word of its text.

    >>> marks_answers("{# no {% generation %} #} code generation"), marks_answers("{%- generation -%}")
    (False, True)
    """
    try:
        lexed = [(kind, value) for _, kind, value in Environment().lex(template) if kind != "whitespace"]
    except TemplateError:
        return False  # which writing with it will report
    return any(first[0] == "block_begin" and second == ("name", "generation") for first, second in pairwise(lexed))


# -- messages to text -------------------------------------------------------------------------------------------------


def _write(
    chat: Chat,
    tokenizer: PreTrainedTokenizerBase,
    *,
    upto: int | None = None,
    prompt: bool = False,
    marked: bool = False,
) -> tuple[str, Spans]:
    """The text of the first `upto` messages, with a prompt for an answer behind it, and the parts that are marked."""
    try:
        texts, spans = render_jinja_template(
            [chat.messages[:upto]],
            tools=chat.tools,
            chat_template=tokenizer.get_chat_template(tools=chat.tools),
            return_assistant_tokens_mask=marked,
            add_generation_prompt=prompt,
            **tokenizer.special_tokens_map,
        )
    except (TemplateError, TypeError) as error:
        raise Refused(f"the tokenizer's chat template does not take this conversation: {error}") from None
    return texts[0], spans[0] if marked else []


def _marked(chat: Chat, spans: Spans) -> Spans:
    """The spans that a template marked, of answers to learn."""
    if not chat.not_learned:
        return spans
    if len(spans) != len(chat.answers):
        raise ValueError(
            f"the tokenizer's chat template marks {len(spans)} parts of {len(chat.answers)} answers, so that it is not "
            "known which of them are those not to learn"
        )
    return [span for number, span in zip(chat.answers, spans, strict=True) if number not in chat.not_learned]


def _added(chat: Chat, tokenizer: PreTrainedTokenizerBase, text: str) -> Spans:
    """What each answer to learn adds to the conversation before it."""
    spans = []
    for number in chat.learned:
        before, _ = _write(chat, tokenizer, upto=number, prompt=True)
        after, _ = _write(chat, tokenizer, upto=number + 1)
        if not text.startswith(after) or not after.startswith(before):
            raise ValueError(
                "the tokenizer's chat template writes a conversation's beginning differently when more follows; "
                "mark the assistant's part in it with {% generation %} ... {% endgeneration %}"
            )
        spans.append((len(before), len(after)))
    return spans


def _parts(chat: Chat) -> Iterator[tuple[str, Chat]]:
    """What a conversation has besides roles and texts: its name, and the conversation without it."""
    if chat.tools:
        yield "tools", replace(chat, tools=None)
    for number, message in enumerate(chat.messages):
        for field in sorted(message.keys() - _NEEDLESS):
            if field != "name" or message["role"] not in ("tool", "function"):  # the call says it
                without = {key: value for key, value in message.items() if key != field}
                yield f"{field} of message {number + 1}", _changed(chat, number, without)


def _texts(chat: Chat, text: str) -> Iterator[tuple[str, Chat]]:
    """The same of the messages' own texts, but those that are plainly there."""
    for number, message in enumerate(chat.messages):
        usual = message["role"] in ("user", "assistant") and "tool_calls" not in message
        if message["content"] and not (usual and message["content"].strip() in text):
            name = f"the text of message {number + 1}, of role {message['role']},"
            yield name, _changed(chat, number, message | {"content": ""})


def _changed(chat: Chat, number: int, message: Message) -> Chat:
    return replace(chat, messages=[*chat.messages[:number], message, *chat.messages[number + 1 :]])


def _check_written(chat: Chat, tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """ValueError for what makes no difference to the text: the template passes it over."""
    for name, without in chain(_parts(chat), _texts(chat, text)):
        try:
            is_written = _write(without, tokenizer)[0] != text
        except Refused:
            is_written = True
        if not is_written:
            raise ValueError(f"the tokenizer's chat template does not write {name}; leave it out, or use another")


# -- text to tokens ---------------------------------------------------------------------------------------------------


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))


def _protect(chat: Chat, specials: Iterable[str]) -> tuple[Chat, dict[str, str]]:
    """The conversation with a character that it does not have in each special token's place, and what those mean."""
    pattern, texts = _any_of(specials), list(_strings([chat.messages, chat.tools]))
    if not any(map(pattern.search, texts)):
        return chat, {}
    taken = set(chain.from_iterable(texts))
    spare = (character for character in map(chr, range(0x100000, 0x10FFFE)) if character not in taken)
    stand_ins = dict(zip(specials, spare, strict=False))

    def protected(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda found: stand_ins[found[0]], value)
        if isinstance(value, dict):
            return {protected(key): protected(item) for key, item in value.items()}
        return list(map(protected, value)) if isinstance(value, list) else value

    messages = [{**protected(message), "role": message["role"]} for message in chat.messages]
    chat = replace(chat, messages=messages, tools=protected(chat.tools))
    return chat, {character: special for special, character in stand_ins.items()}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in chain(value, value.values()) if isinstance(value, dict) else value:
            yield from _strings(item)


def _tokens_in_pieces(
    text: str,
    spans: Spans,
    tokenizer: PreTrainedTokenizerBase,
    specials: dict[str, int],
    stand_ins: dict[str, str],
) -> tuple[list[int], Spans]:
    """Cut at answers, as the prompt is when the model answers it, and at special tokens, which are one token each."""
    cut = re.compile(f"({_any_of(specials).pattern})")
    tokens: list[int] = []
    found: Spans = []
    back = str.maketrans(stand_ins)
    for start, end in pairwise(sorted({0, len(text), *chain.from_iterable(spans)})):
        first = len(tokens)
        for part in cut.split(text[start:end]):
            known = specials.get(part)
            tokens += [known] if known is not None else tokenizer.encode(part.translate(back), add_special_tokens=False)
        if (start, end) in spans:
            found.append((first, len(tokens)))
    return tokens, found


def _tokens_with_offsets(text: str, spans: Spans, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], Spans]:
    """Of a marked part, every token that has a character of it."""
    if not tokenizer.is_fast:
        raise ValueError(
            "a chat template that marks answers needs a fast tokenizer, which knows its tokens' characters"
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts, ends = np.array(encoded["offset_mapping"]).reshape(-1, 2).T
    found = [(int(np.searchsorted(ends, start, "right")), int(np.searchsorted(starts, end))) for start, end in spans]
    return list(encoded["input_ids"]), found


def _tokens_by_turns(text: str, spans: Spans, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], Spans]:
    """The whole text's tokens; ValueError where an answer does not begin and end with one of them."""

    def encoded(length: int) -> list[int]:
        return list(tokenizer(text[:length], add_special_tokens=False)["input_ids"])

    tokens = encoded(len(text))
    found = []
    for start, end in spans:
        before, after = encoded(start), encoded(end)
        if tokens[: len(after)] != after or after[: len(before)] != before:
            raise ValueError(
                "the tokenizer joins an answer with the chat template's text before or behind it: "
                f"{text[start:end]!r:.60}; mark the assistant's part in the template with "
                "{% generation %} ... {% endgeneration %}"
            )
        found.append((len(before), len(after)))
    return tokens, found
