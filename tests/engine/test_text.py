"""Text comes out as the whole decodes, never what a later token changes, and ends where it has to."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oncelm.engine.params import SamplingParams
from oncelm.engine.text import TextState
from tests.data.test_detokenize import TOKENIZERS

kinds = pytest.mark.parametrize("kind", TOKENIZERS)
letters = st.sampled_from([*"and \n", "\u00e9", "\u65e5", "\u672c", "\U0001f600"])
texts = st.lists(letters, max_size=14).map("".join)
stops = st.lists(st.lists(letters, min_size=1, max_size=4).map("".join), max_size=3)


def state(kind: str, **options) -> TextState:
    """Of an answer to a prompt."""
    tokenizer = TOKENIZERS[kind]
    params = SamplingParams(**{"max_tokens": None} | options)
    return TextState(tokenizer, params, tokenizer("and").input_ids, {tokenizer.eos_token_id})


def ids_of(kind: str, text: str) -> list[int]:
    """Of a text that comes behind another one."""
    tokenizer = TOKENIZERS[kind]
    before = tokenizer("and").input_ids
    return tokenizer("and" + text).input_ids[len(before) :]


def write(state: TextState, ids: list[int]) -> tuple[list[str], str | None, int | str | None]:
    pieces = []
    for token in ids:
        piece, finish, stop = state.append(token)
        pieces.append(piece)
        if finish is not None:
            return pieces, finish, stop
    return pieces, None, None


@kinds
@settings(deadline=None, max_examples=80)
@given(text=texts, stop=stops, include=st.booleans())
def test_an_answer_ends_at_its_first_stop_string(kind, text, stop, include) -> None:
    """Whatever tokens it is spelled with; what came out before never has to be taken back."""
    answer = state(kind, stop=stop, include_stop_str_in_output=include)
    ids = ids_of(kind, text)
    pieces, finish, reason = write(answer, ids)
    right = expected(text, stop, include)
    if right is None:
        assert finish is None
        assert "".join(pieces) + answer.end() == text
    else:
        assert "".join(pieces) == answer.text
        assert (answer.text, finish, reason) == (right[0], "stop", right[1])


def expected(text: str, stop: list[str], include: bool) -> tuple[str, str] | None:
    """The text up to the stop string that is complete first: of several, the one that begins first."""
    for end in range(1, len(text) + 1):
        found = [(end - len(one), one) for one in stop if text[:end].endswith(one)]
        if found:
            start, one = min(found, key=lambda place: place[0])
            return text[: end if include else start], one
    return None


@kinds
@settings(deadline=None, max_examples=60)
@given(text=texts, stop=stops, data=st.data())
def test_what_comes_out_stays(kind, text, stop, data) -> None:
    """Of an answer that goes on in any way, and is not ended by a stop string, all that came out is a beginning."""
    ids = ids_of(kind, text)
    other = data.draw(texts)
    cut = data.draw(st.integers(0, len(ids)))
    one, two = state(kind, stop=stop), state(kind, stop=stop)
    write(one, ids[:cut])
    write(two, ids[:cut] + ids_of(kind, other))
    assert two.text.startswith(one.text)


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_tokens_join_to_what_they_decode_to(kind, data) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(4, len(tokenizer) - 1), max_size=20))
    answer = state(kind, max_tokens=max(1, len(ids)))
    pieces, finish, _ = write(answer, ids)
    assert finish == ("length" if ids else None)
    assert "".join(pieces) == answer.text == tokenizer.decode(ids, skip_special_tokens=True)


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none() -> None:
    answer = state("bytes", stop=["ab\u00e9", "bx"])
    pieces, finish, _ = write(answer, ids_of("bytes", "aabab\u00e8abb"))
    assert (pieces, finish) == (["", "a", "", "ab", "", "", "ab\u00e8", "", "", "ab"], None)
    assert (answer.end(), answer.text) == ("b", "aabab\u00e8abb")


def test_end_tokens() -> None:
    tokenizer = TOKENIZERS["bytes"]
    end, other = tokenizer.eos_token_id, ids_of("bytes", "!")[0]
    word = ids_of("bytes", "hi")
    for options, ids, right in (
        ({}, [*word, end, *word], ("hi", "stop", None, 3)),
        ({"ignore_eos": True, "max_tokens": 4}, [*word, end, *word], ("hih", "length", None, 4)),
        ({"stop_token_ids": [other]}, [*word, other], ("hi", "stop", other, 3)),
        ({"stop_token_ids": [other], "include_stop_str_in_output": True}, [*word, other], ("hi!", "stop", other, 3)),
        ({"max_tokens": 2, "stop": "hi"}, word, ("", "stop", "hi", 2)),
        ({"max_tokens": 2, "stop": "hi there"}, word, ("hi", "length", None, 2)),  # what was held back comes out
        ({"max_tokens": 3, "min_tokens": 2, "stop": "hi"}, [*word, *word], ("hih", "length", None, 3)),
        ({"max_tokens": 5, "min_tokens": 2, "stop": "hi"}, [*word, *word], ("hi", "stop", "hi", 4)),
        (
            {"skip_special_tokens": False, "ignore_eos": True, "max_tokens": 2},
            [end, *word],
            ("</s>h", "length", None, 2),
        ),
    ):
        answer = state("bytes", **options)
        _, finish, stop = write(answer, ids)
        assert (answer.text, finish, stop, answer.num_tokens) == right


def test_no_text_is_made_where_none_is_wanted() -> None:
    word = ids_of("bytes", "hi")
    for tokenizer, detokenize in ((None, True), (TOKENIZERS["bytes"], False)):
        answer = TextState(tokenizer, SamplingParams(max_tokens=2, detokenize=detokenize), word)
        assert write(answer, word) == ([None, None], "length", None)
        assert answer.end() == answer.text == ""


def test_a_structure_that_is_complete_ends_the_answer() -> None:
    class OneLetter:
        finished = False

        def accept(self, token: int) -> None:
            self.finished = True

    word = ids_of("bytes", "hi")
    answer = TextState(TOKENIZERS["bytes"], SamplingParams(), word, grammar=OneLetter())
    assert write(answer, word) == (["h"], "stop", None)
