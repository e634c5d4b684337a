"""Tokenizers of GGUF files: the ids of the tokenizer that the file was made from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from oncelm.cli import main
from oncelm.models.gguf import read_gguf
from oncelm.models.gguf.cuts import CUTS, find_cut
from tests.models.gguf.files import make_llama, write

# What each tokenizer.json has in the place of the cut, spelt out as there.
L3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
Q2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SEED = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}"
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
DIGITS = pre_tokenizers.Digits(individual_digits=True)
WORDS = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")


def cuts(*patterns: str) -> list:
    return [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]


ORIGINALS = {
    "llama-bpe": [*cuts(L3), BYTES],
    "smaug-bpe": [*cuts(L3), BYTES],
    "qwen2": [*cuts(Q2), BYTES],
    "seed-coder": [*cuts(SEED), BYTES],
    "tekken": [*cuts(TEKKEN), BYTES],
    "gpt-4o": [*cuts(O200K), BYTES],
    "deepseek-v3": [*cuts(r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", V3), BYTES],
    "deepseek-coder": [*cuts(*CODER), DIGITS, BYTES],
    "gpt-2": [WORDS],
    "trillion": [WORDS],
    "smollm": [DIGITS, WORDS],
    "bloom": [*cuts(BLOOM), BYTES],
    "viking": [*cuts(BLOOM), DIGITS, BYTES],
}
PROMPTS = (
    "In 1999",
    "x = 12.50;\n\n\n",
    "\n\n\tdef f(self):\r\n    return None  # why?\n",
    "HTTPServer DON'T it's IT'S we'Ve",
    "   three   spaces \t tab\t\n \n x",
    "漢字仮名, かな! 여기  naïve e\u0301clair ½ ³ ١٢٣",
    "a,b.c (d) [e] {f} …; «g» $5+4<=9 ~^`| //\n\n!!\n",
    "https://x.org/a_b-c?d=1&e=%20 🙂🙂",
    "",
    " ",
)
CORPUS = [*PROMPTS, "the 1999 of 12.50 def self x = ; it's DON'T HTTPServer 漢字 かな 여기 e\u0301"] * 3


def train(name: str, composed: bool = False) -> Tokenizer:
    """A tokenizer with that original's cut, its merges learned from the prompts cut less, so that every cut shows."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = BYTES  # merges across all borders that a cut could respect
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(ORIGINALS[name])
    tokenizer.normalizer = normalizers.NFC() if composed else None
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def tokens_of(tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]


def merges_of(tokenizer: Tokenizer) -> list[str]:
    return [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def byte_level(tokenizer: Tokenizer, pre: str | None, **more: object):
    """Adds the tokenizer to a GGUF file; `more` are methods of the writer and their values."""

    def add(writer) -> None:
        tokens = tokens_of(tokenizer)
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
        writer.add_token_merges(merges_of(tokenizer))
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        for name, value in more.items():
            getattr(writer, f"add_{name}")(value)

    return add


def convert(tmp_path: Path, tokenizer, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of the converted folder."""
    small = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": vocab_size}
    write(make_llama(**small), tmp_path / "m.gguf", tokenizer=tokenizer)
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "out"), "--overwrite"]) == 0
    return AutoTokenizer.from_pretrained(tmp_path / "out")


def refused(tmp_path: Path, tokenizer, vocab_size: int = 1200) -> str:
    small = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": vocab_size}
    write(make_llama(**small), tmp_path / "m.gguf", tokenizer=tokenizer)
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the caller looks at the text)
        read_gguf(tmp_path / "m.gguf")
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ORIGINALS)
def test_ids_are_the_originals(name, tmp_path) -> None:
    original = train(name, composed=name == "qwen2")
    converted = convert(tmp_path, byte_level(original, name, add_bos_token=False), original.get_vocab_size())
    other = train("gpt-2" if name not in ("gpt-2", "trillion") else "llama-bpe")
    differs = 0
    for prompt in PROMPTS:
        wanted = original.encode(prompt, add_special_tokens=False).ids
        if name in ("llama-bpe", "tekken"):  # these take a word of the vocabulary as it is
            words = [word for word, _ in original.pre_tokenizer.pre_tokenize_str(prompt)]
            wanted = [i for word in words for i in whole_word(original, word)]
        assert converted(prompt).input_ids == wanted, prompt
        differs += wanted != other.encode(prompt, add_special_tokens=False).ids
        assert converted.decode(wanted) == (prompt if name != "qwen2" else normalizers.NFC().normalize_str(prompt))
    assert differs >= 2


def whole_word(tokenizer: Tokenizer, word: str) -> Iterable[int]:
    known = tokenizer.token_to_id(word)
    return [token.id for token in tokenizer.model.tokenize(word)] if known is None else [known]


def test_words_of_the_vocabulary_are_taken_as_they_are(tmp_path) -> None:
    """Llama 3's vocabulary has words that its merges do not reach."""
    original = train("llama-bpe")
    original.model = BPE(
        original.get_vocab() | {"Ġdont": original.get_vocab_size()},
        [tuple(merge.split(" ")) for merge in merges_of(original)],
    )
    for name, whole in (("llama-bpe", True), ("tekken", True), ("smaug-bpe", False)):
        converted = convert(tmp_path, byte_level(original, name), original.get_vocab_size())
        assert ("Ġdont" in converted.tokenize("I dont know")) is whole


@pytest.mark.parametrize("name", CUTS)
def test_every_cut_keeps_all_of_a_text(name) -> None:
    """Each regular expression compiles, and the pieces together are the text."""
    pre_tokenizer = find_cut(name).pre_tokenizer()
    for prompt in PROMPTS:
        pieces = [piece for piece, _ in pre_tokenizer.pre_tokenize_str(prompt)]
        assert decoders.ByteLevel().decode(pieces) == prompt


def test_the_pieces_of_deepseek_llm() -> None:
    """Its third step takes the letters from A to z out of words once more."""
    pre_tokenizer = find_cut("deepseek-llm").pre_tokenizer()
    pieces = [piece for piece, _ in pre_tokenizer.pre_tokenize_str("Die 19 Bäume,  漢字\n x")]
    assert [decoders.ByteLevel().decode([piece]) for piece in pieces] == (
        ["Die", " ", "1", "9", " B", "ä", "ume", ",", "  ", "漢字", "\n", " x"]
    )


@pytest.mark.parametrize("pre", [None, "default", "kimi-k2", "lama-bpe"])
def test_an_unknown_cut_is_refused(pre, tmp_path) -> None:
    message = refused(tmp_path, byte_level(train("gpt-2"), pre))
    if pre in (None, "default"):
        assert "tokenizer.ggml.pre does not say how text is cut" in message
    else:
        assert f"unknown tokenizer.ggml.pre {pre!r}" in message
        assert "Allowed: llama3, " in message
        assert ("did you mean 'llama-bpe'" in message) is (pre == "lama-bpe")


@pytest.mark.parametrize(
    ("pre", "more", "added"),
    [
        ("llama-bpe", {}, ([0], [])),
        ("llama-bpe", {"add_bos_token": False}, ([], [])),
        ("smollm", {}, ([], [])),
        ("smollm", {"add_bos_token": True}, ([0], [])),
        ("smollm", {"add_bos_token": True, "add_eos_token": True}, ([0], [1])),
    ],
)
def test_bos_and_eos_are_added_as_the_file_says(pre, more, added, tmp_path) -> None:
    original = train("gpt-2")
    converted = convert(tmp_path, byte_level(original, pre, **more), original.get_vocab_size())
    plain = converted("def f", add_special_tokens=False).input_ids
    assert converted("def f").input_ids == [*added[0], *plain, *added[1]]
    assert (converted.bos_token, converted.eos_token, converted.padding_side) == ("<s>", "</s>", "left")
    assert converted("</s>def<s>", add_special_tokens=False).input_ids[0] == 1
    assert converted.decode(converted("def f</s>").input_ids, skip_special_tokens=True) == "def f"


def test_user_defined_tokens_stay_whole(tmp_path) -> None:
    original = train("gpt-2")
    tokens = [*tokens_of(original), "<think>", "   "]

    def add(writer) -> None:
        byte_level(original, "gpt-2")(writer)
        for key in ("tokens", "token_type"):
            writer.kv_data[0].pop(f"tokenizer.ggml.{key}")
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 5) + [4] * 2)

    converted = convert(tmp_path, add, len(tokens))
    assert converted.tokenize("x<think>y   z")[1:5:2] == ["<think>", "   "]
    ids = converted("x<think>y").input_ids
    assert converted.decode(ids, skip_special_tokens=True) == "x<think>y"


def test_chat_templates_by_name(tmp_path) -> None:
    original = train("gpt-2")
    templates = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    converted = convert(tmp_path, byte_level(original, "gpt-2", chat_template=templates), original.get_vocab_size())
    assert converted.chat_template == {"default": "A", "tool_use": "B"}


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda w: w.add_add_space_prefix(True), "add_space_prefix True, which only sentencepiece"),
        (
            lambda w: w.add_remove_extra_whitespaces(True),
            "remove_extra_whitespaces True, which the",
        ),
        (lambda w: w.add_add_sep_token(True), "add_sep_token True"),
        (lambda w: w.add_bool("tokenizer.ggml.normalizer.lowercase", True), "normalizer.lowercase True"),
        (lambda w: w.add_array("tokenizer.ggml.suppress_tokens", [1, 2]), "tokenizer.ggml.suppress_tokens"),
        (lambda w: w.add_precompiled_charsmap(b"\x01\x02"), "tokenizer.ggml.precompiled_charsmap"),
        (lambda w: w.add_uint32("tokenizer.ggml.mask_token_id", 10**6), "mask_token_id 1000000: its"),
        (lambda w: w.add_string("tokenizer.ggml.cls_token_id", "x"), "cls_token_id 'x': its"),
        (lambda w: w.add_array("tokenizer.ggml.add_bos_token", [1, 2]), "add_bos_token [1, 2]"),
        (lambda w: w.add_uint32("tokenizer.chat_template", 1), "a tokenizer.chat_template that is no text"),
        (lambda w: w.kv_data[0].pop("tokenizer.ggml.merges"), "has no tokenizer.ggml.merges"),
        (lambda w: w.kv_data[0].pop("tokenizer.ggml.tokens"), "has no tokenizer.ggml.tokens"),
        (
            lambda w: w.kv_data[0].pop("tokenizer.ggml.model"),
            "unknown tokenizer.ggml.model None; Allowed: gpt2",
        ),
        (lambda w: replace(w, "model", lambda v: "bert"), "tokenizer.ggml.model 'bert'; Allowed: gpt2, llama"),
        (lambda w: replace(w, "tokens", lambda v: [*v[:-1], v[5]]), "twice, as ids 5 and"),
        (lambda w: replace(w, "tokens", lambda v: v * 3), "tokenizer.ggml.tokens; its token_embd.weight is of 1,200"),
        (lambda w: replace(w, "token_type", lambda v: v[:-1]), "token_type that are not"),
        (lambda w: replace(w, "merges", lambda v: [*v, "ab"]), "merges that are not pairs"),
        (lambda w: replace(w, "merges", lambda v: [*v, "x yqqz"]), "vocabulary"),
        (lambda w: (w.kv_data[0].pop("tokenizer.ggml.bos_token_id"), w.add_add_bos_token(True)), "bos_token_id None"),
    ],
)
def test_what_the_tokenizer_would_not_honour(add, message, tmp_path) -> None:
    def tokenizer(writer) -> None:
        byte_level(train("gpt-2"), "gpt-2")(writer)
        add(writer)

    assert message in refused(tmp_path, tokenizer)


def replace(writer, key: str, change) -> None:
    value = writer.kv_data[0][f"tokenizer.ggml.{key}"]
    value.value = change(value.value)


# -- sentencepiece ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")

    def train_model(prefix: bool):
        (folder / "text.txt").write_text("the sea is wide, the ship is small.\n  a b c café 漢字\n" * 50)
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "text.txt"),
            model_prefix=str(folder / f"m{prefix}"),
            vocab_size=310,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            add_dummy_prefix=prefix,
            minloglevel=2,
        )
        return sentencepiece.SentencePieceProcessor(model_file=str(folder / f"m{prefix}.model"))

    return train_model


def sentencepiece_keys(model, **more: object):
    def add(writer) -> None:
        count = model.get_piece_size()
        kinds = [
            2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
            for i in range(count)
        ]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list([model.id_to_piece(i) for i in range(count)])
        writer.add_token_scores([model.get_score(i) for i in range(count)])
        writer.add_token_types(kinds)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        for name, value in more.items():
            getattr(writer, f"add_{name}")(value)

    return add


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_ids(prefix, sentencepiece_model, tmp_path) -> None:
    model = sentencepiece_model(prefix)
    more = {} if prefix else {"add_space_prefix": False}
    converted = convert(tmp_path, sentencepiece_keys(model, **more), model.get_piece_size())
    for prompt in (*PROMPTS, "the sea", " the sea", "   is   wide ", "the ship\n\n is small", "▁the"):
        wanted = model.encode(prompt)
        assert converted(prompt).input_ids == [1, *wanted], prompt
        assert converted.decode(wanted) == prompt.replace("▁", " ")


def test_sentencepiece_that_names_no_special_tokens(sentencepiece_model, tmp_path) -> None:
    model = sentencepiece_model(True)

    def keys(writer) -> None:
        sentencepiece_keys(model)(writer)
        for name in ("bos", "eos", "unknown"):
            writer.kv_data[0].pop(f"tokenizer.ggml.{name}_token_id")

    converted = convert(tmp_path, keys, model.get_piece_size())
    assert converted("the sea").input_ids == [1, *model.encode("the sea")]
    assert converted.eos_token == "</s>"


def test_sentencepiece_without_bos(sentencepiece_model, tmp_path) -> None:
    model = sentencepiece_model(True)
    keys = sentencepiece_keys(model, add_bos_token=False, add_eos_token=True)
    converted = convert(tmp_path, keys, model.get_piece_size())
    assert converted("the sea").input_ids == [*model.encode("the sea"), 2]


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (
            lambda w: w.kv_data[0].pop("tokenizer.ggml.scores"),
            "neither tokenizer.ggml.scores nor tokenizer.ggml.m",
        ),
        (lambda w: replace(w, "scores", lambda v: v[:-1]), "scores that are not"),
        (lambda w: replace(w, "pre", lambda v: "llama-bpe"), "unknown tokenizer.ggml.pre of"),
    ],
)
def test_sentencepiece_that_is_refused(add, message, sentencepiece_model, tmp_path) -> None:
    model = sentencepiece_model(True)

    def tokenizer(writer) -> None:
        sentencepiece_keys(model)(writer)
        add(writer)

    assert message in refused(tmp_path, tokenizer, model.get_piece_size())
