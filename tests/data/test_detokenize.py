"""Text in pieces: joined, it is the text of the whole, of every kind of tokenizer, wherever prompt and answer end."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from oncelm import load_tokenizer
from oncelm.data.detokenize import MOST_PENDING, UNKNOWN, ByteStream, TextStream, text_stream
from oncelm.data.tokenizers import train_bpe

SPACE = "\u2581"


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """As Llama 2's: a space shows on decoding only between words, and rare characters are bytes."""
    words = [SPACE, f"{SPACE}a", f"{SPACE}an", f"{SPACE}and", *"and"]
    names = ["<s>", "</s>", *words, *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [(SPACE, "a"), (f"{SPACE}a", "n"), (f"{SPACE}an", "d")]
    tokenizer = Tokenizer(BPE({name: i for i, name in enumerate(names)}, merges, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {
    "bytes": load_tokenizer("bytes"),
    "bpe": train_bpe(["the sea, the \u65e5\u672c sea \U0001f600 \U0001f601"] * 5, 310),
    "sentencepiece": sentencepiece_like(),
}
characters = st.sampled_from(
    [*"and, \n", "\u00e9", "\u65e5", "\u672c", "\U0001f600", "\u200d", UNKNOWN]
) | st.characters(exclude_categories=["Cs"])
texts = st.lists(characters, max_size=12).map("".join)
kinds = pytest.mark.parametrize("kind", TOKENIZERS)


def raw(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bytes:
    """The bytes that tokens stand for, spelled out by their names; special tokens stand for none."""
    content = b""
    for name in tokenizer.convert_ids_to_tokens([i for i in ids if i not in tokenizer.all_special_ids]):
        if tokenizer is TOKENIZERS["sentencepiece"]:
            is_byte = name.startswith("<0x")
            content += bytes([int(name[3:5], 16)]) if is_byte else name.replace(SPACE, " ").encode()
        else:
            content += bytes(BYTE_OF[character] for character in name)
    return content


# the names that a byte-level vocabulary gives to bytes, by what the tokenizer of plain bytes makes of each
BYTE_OF = {TOKENIZERS["bytes"].convert_ids_to_tokens(4 + byte): byte for byte in range(256)}


def streamed(tokenizer: PreTrainedTokenizerFast, prompt: list[int], answer: list[int]) -> str:
    """The text of the pieces, the same of every kind of stream that there is for a tokenizer."""
    stream, other = text_stream(tokenizer, prompt), TextStream(tokenizer, prompt)
    text = "".join(map(stream.add, answer)) + stream.end()
    assert text == "".join(map(other.add, answer)) + other.end()
    return text


@kinds
@settings(deadline=None, max_examples=150)
@given(data=st.data(), text=texts)
def test_pieces_join_to_the_text(kind, data, text) -> None:
    """Prompt and answer end anywhere, within a character too: it belongs to the answer; one that is cut is unknown."""
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer("x" + text, split_special_tokens=True).input_ids
    cut = data.draw(st.integers(0, len(ids)))
    end = data.draw(st.integers(cut, len(ids)))
    shown = raw(tokenizer, ids[:cut]).decode("utf-8", errors="ignore")  # ids of a text: only its end can be broken
    written = raw(tokenizer, ids[:end])
    right = written.decode("utf-8", errors="ignore")
    got = streamed(tokenizer, ids[:cut], ids[cut:end])
    if kind == "sentencepiece" and not cut:
        shown = " "  # the mark of a text's start
    rest = got.removeprefix(right[len(shown) :])
    assert got.startswith(right[len(shown) :])
    is_cut = end > cut and written != right.encode()
    assert set(rest) == ({UNKNOWN} if is_cut else set())
    if not is_cut and raw(tokenizer, ids[:cut]) == shown.encode():
        whole, before = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:end], ids[:cut]))
        assert got == whole[len(before) :]


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_tokens_stream_as_they_decode(kind, data) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(4, len(tokenizer) - 1), max_size=30))
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    assert streamed(tokenizer, tokenizer("a").input_ids, ids) == whole


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_bytes_come_out_with_the_last_of_a_character(data) -> None:
    """Nothing that is certain is held back, also of a token that ends within a character; tokens may be special."""
    tokenizer = TOKENIZERS[data.draw(st.sampled_from(["bytes", "bpe"]))]
    ids = data.draw(st.lists(st.integers(0, len(tokenizer)), max_size=20))
    skip = data.draw(st.booleans())
    stream, given = ByteStream(tokenizer, skip_special_tokens=skip), ""
    for count, token in enumerate(ids, 1):
        given += stream.add(token)
        whole = tokenizer.decode(ids[:count], skip_special_tokens=skip)
        assert whole.removesuffix(UNKNOWN) in (given, given.removesuffix(UNKNOWN))
        assert whole.startswith(given)
    assert given + stream.end() == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("answer", ["\u5b57 and", "\u5b57\u6f22 and", " and", "and"])
@pytest.mark.parametrize("prompt", ["the \u6f22", "\u6f22\u5b57", "and", "and ", "\u65e5" * 40])
def test_behind_a_character_of_bytes(prompt, answer) -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer(prompt + answer).input_ids
    for cut in range(1, len(ids)):
        before = tokenizer.decode(ids[:cut])
        if UNKNOWN not in before:
            assert before + streamed(tokenizer, ids[:cut], ids[cut:]) == prompt + answer


def test_a_space_behind_special_tokens_is_kept() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    name = tokenizer.convert_tokens_to_ids
    prompt = [name(f"{SPACE}and"), *[name("</s>")] * 20]
    assert streamed(tokenizer, prompt, [name(f"{SPACE}and")]) == " and"


def test_what_is_out_stays_when_a_byte_breaks_its_run() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.convert_tokens_to_ids(["<0xE6>", "<0x97>", "<0xA5>", "<0xE6>", f"{SPACE}and"])
    assert streamed(tokenizer, [], ids) == "\u65e5\ufffd and"


@kinds
def test_bytes_of_no_character_are_not_held_back_for_ever(kind) -> None:
    tokenizer = TOKENIZERS[kind]
    broken = tokenizer("\u65e5").input_ids[-1]  # the last byte of a character
    stream = text_stream(tokenizer, [])
    pieces = [stream.add(broken) for _ in range(3 * MOST_PENDING)]
    assert set("".join(pieces)) == {UNKNOWN}
    assert len("".join(pieces)) >= MOST_PENDING


@pytest.mark.slow
def test_cl100k_base() -> None:
    tokenizer = load_tokenizer("cl100k_base")
    text = "the sea \u6d77\u306f\u5e83 \U0001f469\u200d\U0001f469\u200d\U0001f467 \u00e9"
    ids = tokenizer(text).input_ids
    for cut in range(len(ids)):
        got = streamed(tokenizer, ids[:cut], ids[cut:])
        assert UNKNOWN not in got
        assert text.endswith(got)
        assert text[: len(text) - len(got)] == tokenizer.decode(ids[:cut]).rstrip(UNKNOWN)


def test_a_sentencepiece_model(tmp_path: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text("the ship sailed over the sea\n" * 300)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "model"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    tokenizer = load_tokenizer(tmp_path / "model.model")
    ids = tokenizer("the sea \u6d77\u306f\u5e83\u3044\u306a and the ship").input_ids
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    for cut in range(1, len(ids)):
        before = tokenizer.decode(ids[:cut], skip_special_tokens=True)
        if UNKNOWN not in before:
            assert before + streamed(tokenizer, ids[:cut], ids[cut:]) == whole
