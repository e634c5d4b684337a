"""A conversation to tokens: what the assistant wrote is learned, special tokens are the template's, text stays text."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from oncelm.data.chats import Chat
from oncelm.data.conversations import read_conversations
from oncelm.data.templates import encode, marks_answers
from oncelm.data.tokenizers import load_tokenizer, train_bpe

CHAT = [{"role": "user", "content": "Two and two?"}, {"role": "assistant", "content": "Four."}]
SYSTEM = {"role": "system", "content": "Be brief."}
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}|"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
UNMARKED = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENDED = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ENDED_MARKED = (
    ("{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}</s>{% endgeneration %}{% endfor %}")
    .replace("{% generation %}", "{% if m.role == 'assistant' %}{% generation %}", 1)
    .replace("{% endgeneration %}", "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}")
)
TOOLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "</s>"}}}


@pytest.fixture
def tokenizer():
    return load_tokenizer("bytes")


@pytest.fixture(scope="module")
def own():
    """OnceLM's own tokenizers, one of each kind."""
    text = "user: Two and two?</s>assistant: Four.</s>user: One?</s>\n"
    return {
        "bytes": load_tokenizer("bytes"),
        "bpe": train_bpe([text * 9], 300),
        "cl100k_base": load_tokenizer("cl100k_base"),
    }


@pytest.fixture(scope="module")
def foreign():
    """A tokenizer like most on the Hub, in whose texts "</s>" is the special token."""
    inner = train_bpe(["user: Two and two? assistant: Four. Caf\u00e9!\n" * 9], 300).backend_tokenizer.to_str()
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(inner), bos_token="<s>", eos_token="</s>")


def learned(chat: Chat, tokenizer) -> str:
    tokens, answer = encode(chat, tokenizer)
    return tokenizer.decode(tokens[answer])


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
    tokens, answer = encode(Chat(CHAT), tokenizer)
    assert tokenizer.decode(tokens) == text
    assert [tokenizer.decode(tokens[answer])] == answers
    twice = [SYSTEM, *CHAT, *CHAT]
    assert learned(Chat(twice), tokenizer) == answers[0] * 2
    assert learned(Chat([*twice[:4], twice[4] | {"content": "5"}], frozenset({2})), tokenizer) == answers[0].replace(
        "Four.", "5"
    )
    assert learned(Chat(CHAT[1:]), tokenizer) == answers[0]


@pytest.mark.parametrize("template", [ENDED, ENDED_MARKED], ids=["unmarked", "marked"])
@pytest.mark.parametrize("name", ["bytes", "bpe", "cl100k_base"])
def test_the_templates_end_is_one_token_and_a_texts_is_none(own, name: str, template: str) -> None:
    tokenizer = own[name]
    tokenizer.chat_template = template
    typed = [{"role": "user", "content": "</s>, <s>?"}, {"role": "assistant", "content": "No </s>."}]
    tokens, answer = encode(Chat([*CHAT, *typed]), tokenizer)
    text = "user: Two and two?</s>assistant: Four.</s>user: </s>, <s>?</s>assistant: No </s>.</s>"
    assert tokenizer.decode(tokens) == text
    assert (tokens == tokenizer.eos_token_id).sum() == 4
    assert (tokens == tokenizer.bos_token_id).sum() == 0
    ends = [i for i, token in enumerate(tokens[answer]) if token == tokenizer.eos_token_id]
    parts = tokens[answer][: ends[0]], tokens[answer][ends[0] + 1 : ends[1]]
    assert [part.tolist() for part in parts] == [
        tokenizer.encode(text, add_special_tokens=False) for text in ("Four.", "No </s>.")
    ]
    assert ends[1] == answer.sum() - 1


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(["</s>", "<s>", "<", "/s>", "<pad>", "\U00100000", "\u00e9", " a", "\n"]), min_size=1)
        .map("".join)
        .filter(str.strip),
        min_size=2,
        max_size=6,
    ),
    st.sampled_from([ENDED, ENDED_MARKED]),
    st.sampled_from(["bytes", "bpe"]),
)
def test_whatever_is_typed_stays_text(own, texts: list[str], template: str, name: str) -> None:
    tokenizer = own[name]
    tokenizer.chat_template = template
    roles = ["user", "assistant"] * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    tokens, answer = encode(Chat(messages), tokenizer)
    assert tokenizer.decode(tokens) == "".join(f"{role}: {text}</s>" for role, text in zip(roles, texts, strict=False))
    assert tokenizer.decode(tokens[answer]) == "".join(f"{text}</s>" for text in texts[1::2])
    assert (tokens == 2).sum() == len(texts)
    assert not set(tokens.tolist()) & {0, 1, 3}


@pytest.mark.parametrize("template", [UNMARKED.replace("|", "</s>"), MARKED.replace("|", "</s>")])
def test_other_tokenizers_tokens_are_those_of_transformers(foreign, template: str) -> None:
    foreign.chat_template = template
    messages = [SYSTEM, *CHAT, {"role": "user", "content": "</s>?"}, CHAT[1]]
    tokens, answer = encode(Chat(messages), foreign)
    assert tokens.tolist() == foreign.apply_chat_template(messages)["input_ids"]
    assert foreign.decode(tokens[answer]) == "Four.</s>" * 2
    if "generation %" in template:
        options = {"return_assistant_tokens_mask": True, "return_dict": True}
        assert answer.tolist() == list(map(bool, foreign.apply_chat_template(messages, **options)["assistant_masks"]))


def test_a_marked_part_has_all_bytes_of_its_last_character(foreign) -> None:
    foreign.chat_template = MARKED.replace("|", "")
    assert learned(Chat([CHAT[0], {"role": "assistant", "content": "Four \U0001f600"}]), foreign) == "Four \U0001f600"


@pytest.mark.parametrize("name", ["bytes", "bpe", "cl100k_base"])
@pytest.mark.parametrize(
    "head",
    [
        "You are a code generation assistant. ",
        "{# answers stand in {% generation %} #}",
        "{{ '{% generation %}' }}",
        "{% raw %}{% generation %}{% endraw %}",
        "{%- set generation = 1 -%}",
    ],
)
def test_a_template_that_only_speaks_of_generation_marks_nothing(own, name: str, head: str) -> None:
    tokenizer = own[name]
    tokenizer.chat_template = head + ENDED.replace("{{ eos_token }}", "\n")
    assert not marks_answers(tokenizer.chat_template)
    assert learned(Chat(CHAT), tokenizer) == "Four.\n"


@pytest.mark.parametrize("tag", ["{% generation %}", "{%- generation -%}", "{%generation%}", "{%+ generation %}"])
def test_marks_are_found_in_every_spelling(tokenizer, tag: str) -> None:
    assert marks_answers(MARKED.replace("{% generation %}", tag))
    tokenizer.chat_template = MARKED.replace("{% generation %}", tag)
    assert learned(Chat(CHAT), tokenizer) == "Four.|"


def test_tools_and_their_calls_are_written_or_refused(tokenizer) -> None:
    calls = [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}]
    chat = Chat([*calls, CHAT[1]], tools=[{"name": "add"}])
    tokenizer.chat_template = TOOLS
    tokens, answer = encode(chat, tokenizer)
    call = '{"name": "add", "arguments": {"a": "</s>"}}'
    assert (
        tokenizer.decode(tokens) == f'[{{"name": "add"}}]<user>Two and two?|<assistant>{call}|<tool>4|<assistant>Four.|'
    )
    assert 2 not in tokens
    assert tokenizer.decode(tokens[answer]) == call + "|Four.|"
    tokenizer.chat_template = UNMARKED
    with pytest.raises(ValueError, match="does not write tools; leave it out"):
        encode(chat, tokenizer)
    with pytest.raises(ValueError, match="does not write tool_calls of message 2"):
        encode(Chat(chat.messages), tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="only a chat template could write tools, and the tokenizer has none"):
        encode(chat, tokenizer)
    with pytest.raises(ValueError, match="only a chat template could write tool_calls of message 2"):
        encode(Chat(chat.messages), tokenizer)


@pytest.mark.parametrize("field", ["name", "reasoning_content", "thinking"])
def test_a_field_that_the_template_passes_over_is_refused(tokenizer, field: str) -> None:
    chat = Chat([CHAT[0], {**CHAT[1], field: "Ann"}])
    for template in (None, UNMARKED, MARKED):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=rf"write {field} of message 2"):
            encode(chat, tokenizer)
    tokenizer.chat_template = UNMARKED.replace("{{ m.content }}", f"{{{{ m.content }}}}{{{{ m.{field} }}}}")
    assert learned(chat, tokenizer) == "Four.Ann|"


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_a_message_that_the_template_passes_over_is_refused(tokenizer, role: str) -> None:
    chat = Chat([{"role": role, "content": "a"}, *CHAT])
    tokenizer.chat_template = "{% for m in messages if m.role in ('user', 'assistant') %}" + UNMARKED.partition("%}")[2]
    with pytest.raises(ValueError, match=rf"does not write the text of message 1, of role {role}"):
        encode(chat, tokenizer)
    tokenizer.chat_template = None
    tokens, _ = encode(chat, tokenizer)
    assert tokenizer.decode(tokens).startswith(f"{role.capitalize()}:\na\n\nUser:\n")


def test_marks_that_do_not_say_whose_they_are_cannot_be_left_out(tokenizer) -> None:
    tokenizer.chat_template = MARKED.replace("|", "{% endgeneration %}{% generation %}|")
    assert learned(Chat(CHAT), tokenizer) == "Four.|"
    with pytest.raises(ValueError, match="marks 4 parts of 2 answers"):
        encode(Chat(CHAT * 2, frozenset({1})), tokenizer)


def test_a_template_that_changes_what_came_before_is_refused(tokenizer) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + UNMARKED
    with pytest.raises(ValueError, match="mark the assistant's part"):
        encode(Chat(CHAT), tokenizer)


def test_an_answer_joined_with_its_prompt_is_refused_where_it_cannot_be_cut(foreign) -> None:
    foreign.chat_template = ENDED.replace("{{ eos_token }}", "\n")
    with pytest.raises(ValueError, match=r"joins an answer with the chat template's text before or behind it: 'Four\."):
        encode(Chat(CHAT), foreign)


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


@pytest.mark.parametrize("template", ["{% for m in %}", "{{ 'a' + 1 }}", "{{ nothing.of.it }}"])
def test_a_template_that_is_broken_is_said_to_be(tokenizer, template: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="the tokenizer's chat template does not take this conversation"):
        encode(Chat(CHAT), tokenizer)
