"""Long texts in pieces give the tokens of the whole; nothing a tokenizer is set to adds or takes any."""

from __future__ import annotations

import copy
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from oncelm.data import encoding
from oncelm.data.encoding import Encoder, encode_prompt, marks_around
from oncelm.data.tokenizers import train_bpe

TEXT = (
    "It's 1984.\n\n  def f(x):\n\treturn x + 1 \n\nThe clocks, \u6f22\u5b57\u3002\u6f22, were striking; thirteen!\r\n"
    * 20
)


def sentencepiece_like(prepend: str) -> PreTrainedTokenizerFast:
    """A tokenizer that marks the start of a text, and whose words begin with their space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=True)  # to train on words; then, as in Llama's:
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "</s>"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>")


def gpt2_like() -> PreTrainedTokenizerFast:
    """White space at the end of a text is cut into other words there than before a word; a space before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {
    "byte-level": train_bpe([TEXT], 400),
    "marks the start": sentencepiece_like("first"),
    "marks every start": sentencepiece_like("always"),
    "gpt2": gpt2_like(),
}


@pytest.fixture
def short_pieces(monkeypatch) -> None:
    monkeypatch.setattr(encoding, "LONG_TEXT", 120)
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 30)
    monkeypatch.setattr(encoding, "_WINDOW", 60)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_give_the_tokens_of_the_whole(short_pieces, name) -> None:
    encoder = Encoder(TOKENIZERS[name])
    pieces = list(encoder.encode_long([TEXT[:50], TEXT[50:51], TEXT[51:]]))
    assert len(pieces) > 5
    assert [token for piece in pieces for token in piece] == list(encoder.encode([TEXT])[0])


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(TOKENIZERS)),
    st.lists(
        st.sampled_from(["\n", " ", "  ", "word", "It's", "1984", "\u6f22\u5b57", "\u0301", "-", "\r\n", "x"]),
        max_size=200,
    ),
)
def test_pieces_of_any_text_give_the_tokens_of_the_whole(name: str, parts: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "LONG_TEXT", 120)
        patch.setattr(encoding, "PIECE_CHARACTERS", 30)
        patch.setattr(encoding, "_WINDOW", 60)
        encoder = Encoder(TOKENIZERS[name])
        text = "".join(parts)
        pieces = encoder.encode_long(parts)
        assert [token for piece in pieces for token in piece] == list(encoder.encode([text])[0])


def test_a_text_without_a_safe_cut_stays_whole(short_pieces) -> None:
    encoder = Encoder(TOKENIZERS["byte-level"])
    text = string.ascii_lowercase * 100
    (piece,) = encoder.encode_long(text[i : i + 40] for i in range(0, len(text), 40))
    assert piece == encoder.encode([text])[0]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("run", ["a", "ab", " ", "\u6f22", "=", "\n"])
def test_runs_without_a_cut_come_in_bounded_pieces(short_pieces, monkeypatch, caplog, name, run) -> None:
    monkeypatch.setattr(encoding, "_FARTHEST", 240)
    encoder = Encoder(TOKENIZERS[name])
    text = TEXT[:200] + run * 1000 + TEXT[:200]
    for parts in ([text], [text[i : i + 40] for i in range(0, len(text), 40)]):
        pieces = list(encoder.pieces(parts))
        assert "".join(piece for piece, _ in pieces) == text
        assert max(len(piece) for piece, _ in pieces) <= 240 + 40
        ids = [token for piece in pieces for token in encoder.encode_piece(*piece)]
        whole = encoder.encode([text])[0]
        decode = encoder.tokenizer.decode
        assert decode(ids).replace(" ", "") == decode(whole).replace(" ", "")
        assert abs(len(ids) - len(whole)) <= 2 * len(pieces)
    assert sum("has no place to cut it" in record.message for record in caplog.records) <= 1


def test_settings_for_batches_of_equal_length_change_nothing() -> None:
    tokenizer = train_bpe([TEXT], 300)
    before = Encoder(tokenizer)
    tokenizer(["a", "much longer text"], padding=True, truncation=True, max_length=4)  # leaves both switched on
    after = Encoder(tokenizer)
    assert [len(ids) for ids in after.encode(["a", TEXT])] == [1, len(before.encode([TEXT])[0])]
    assert before.fingerprint() == after.fingerprint()


def test_text_that_spells_a_special_token_stays_text(byte_tokenizer) -> None:
    assert list(Encoder(byte_tokenizer).encode(["</s>"])[0]) == [byte + 4 for byte in b"</s>"]


def test_the_fingerprint_tells_tokenizers_apart_and_survives_saving(tmp_path, byte_tokenizer) -> None:
    one, other = train_bpe([TEXT], 300), train_bpe([TEXT], 301)
    assert len({Encoder(tokenizer).fingerprint() for tokenizer in (one, other, byte_tokenizer)}) == 3
    one.save_pretrained(tmp_path)
    assert Encoder(PreTrainedTokenizerFast.from_pretrained(tmp_path)).fingerprint() == Encoder(one).fingerprint()
    one.eos_token = None
    assert Encoder(one).fingerprint() != Encoder(PreTrainedTokenizerFast.from_pretrained(tmp_path)).fingerprint()


def test_tokenizers_of_python_alone_work_too(byte_tokenizer) -> None:
    class Plain:
        """What a tokenizer offers that is not one of the Rust library."""

        bos_token_id, eos_token_id = 0, 2

        def get_vocab(self):
            return {chr(i): i for i in range(128)}

        def __call__(self, texts, **options):
            assert options == {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            return {"input_ids": [[ord(character) for character in text] for text in texts]}

    encoder = Encoder(Plain())
    assert list(encoder.encode(["ab"])[0]) == [97, 98]
    assert encoder.vocab_size == 128
    assert encoder.fingerprint() != Encoder(byte_tokenizer).fingerprint()


@pytest.mark.parametrize("special_tokens", [None, False, True])
@pytest.mark.parametrize("name", ["bytes", "sentencepiece", "its own"])
def test_a_long_prompt_is_what_the_tokenizer_makes_of_it(short_pieces, byte_tokenizer, name, special_tokens) -> None:
    """Marks around it and special tokens in it too, which no cut divides."""
    if name == "sentencepiece":
        tokenizer = sentencepiece_like("first")
    else:
        tokenizer = copy.deepcopy(byte_tokenizer)
        tokenizer.split_special_tokens = name != "its own"
        tokenizer.add_bos_token = tokenizer.add_eos_token = True
        assert marks_around(tokenizer) == ([tokenizer.bos_token_id], [tokenizer.eos_token_id])
    text = (TEXT + "</s> and </s>") * 3
    options = {} if special_tokens is None else {"split_special_tokens": not special_tokens}
    for is_start in (True, False):
        expected = tokenizer(text, add_special_tokens=is_start, **options).input_ids
        assert encode_prompt(tokenizer, text, special_tokens, is_start) == expected
    ends = expected.count(tokenizer.eos_token_id)
    assert ends == (6 if special_tokens or (special_tokens is None and name != "bytes") else 0)
