"""Tokenizers of GGUF files: the ids of the tokenizer that the file was made from, or a refusal."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import AutoTokenizer

from oncelm.cli import main
from oncelm.models.gguf import read_gguf
from oncelm.models.gguf_words import WORDS
from tests.models.gguf_files import gguf, make_llama, write

TEXTS = (
    "In 1999 there were 20265 ships, and 3 of them sank.",
    "x = 12.50;\n\n\n",
    "\n\n\tdef f(x):\n\t\treturn x+=1  # it's\r\n\r\n  done   ",
    "海は広いな大きいな。月は、のぼる！ 한국어 12개",
    "HelloWorld iPhone's DON'T we'LL C'est l'été cafe\u0301 naïve Ελληνικά",
    "<|end|>a<|end|>  **bold** ... $$ ~~ `code` (x|y) [1,234,567]",
    " leading,  double   triple\t\ttabs \u00a0 nbsp",
    "",
)
SPECIALS = ["<|begin|>", "<|end|>", "<|turn|>"]
CUTS = {  # the pre-tokenizers of the published tokenizer.json files
    "llama-bpe": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "qwen2": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "tekken": [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "seed-coder": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
    ],
    "deepseek-coder": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", pre_tokenizers.Digits(True)],
    "smollm": [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "falcon": [
        pre_tokenizers.Punctuation("contiguous"),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(False),
        "[0-9][0-9][0-9]",
    ],
}


def trained(cut: str) -> Tokenizer:
    """A byte-level BPE of many merges, cut as the published tokenizer of that name."""
    tokenizer = Tokenizer(BPE(ignore_merges=cut in ("llama-bpe", "tekken")))
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    steps = [pre_tokenizers.Split(Regex(s), "isolated") if isinstance(s, str) else s for s in CUTS[cut]]
    if not any(isinstance(step, pre_tokenizers.ByteLevel) for step in steps):
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=1,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.replace("<|end|>", "") for text in TEXTS] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def add_bpe(tokenizer: Tokenizer, cut: str | None):
    """What writes it into a GGUF file."""
    model = json.loads(tokenizer.to_str())["model"]

    def add(writer) -> None:
        tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
        kinds = [gguf.TokenType.CONTROL if token in SPECIALS else gguf.TokenType.NORMAL for token in tokens]
        writer.add_tokenizer_model("gpt2")
        if cut is not None:
            writer.add_tokenizer_pre(cut)
        writer.add_token_list(tokens)
        writer.add_token_types(kinds)
        writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)

    return add


def write_with(path, add, more=lambda writer: None, size: int = 1000) -> None:
    write(make_llama(vocab_size=size, num_hidden_layers=1), path, tokenizer=add, more=more)


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("cut", CUTS)
def test_ids_are_those_of_the_tokenizer_in_the_file(cut, tmp_path) -> None:
    original = trained(cut)
    write_with(tmp_path / "model.gguf", add_bpe(original, cut), size=original.get_vocab_size())
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "out")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in TEXTS:
        wanted = original.encode(text, add_special_tokens=False).ids
        assert ids(tokenizer, text) == wanted, (cut, text)
        assert tokenizer.decode(wanted) == original.decode(wanted, skip_special_tokens=False)
    starts = [0] if cut in ("llama-bpe", "tekken") else []  # as in llama.cpp, where the file does not say
    assert tokenizer("In").input_ids == starts + ids(tokenizer, "In")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


def test_the_texts_tell_the_cuts_apart() -> None:
    def cuts(name):
        return [
            [word for word, _ in pre_tokenizers.Sequence(list(WORDS[name].steps)).pre_tokenize_str(text)]
            for text in TEXTS
        ]

    seen = {name: cuts(name) for name in CUTS}
    assert len({str(found) for found in seen.values()}) == len(CUTS)


def test_every_name_cuts_and_loses_nothing() -> None:
    for words in WORDS.values():
        for text in TEXTS:
            pieces = pre_tokenizers.Sequence(list(words.steps)).pre_tokenize_str(text)
            assert decoders.ByteLevel().decode([piece for piece, _ in pieces]) == text


def test_deepseek_llm_cuts_letters_of_alphabets_from_marks_and_digits() -> None:
    cut = pre_tokenizers.Sequence(list(WORDS["deepseek-llm"].steps)).pre_tokenize_str("Kelvin \u03a9x\u212a ab12, 海x")
    assert (
        decoders.ByteLevel().decode(["|".join(piece for piece, _ in cut)]) == "Kelvin| \u03a9x\u212a| ab|1|2|,| |海|x"
    )


@pytest.mark.parametrize("cut", [None, "default"])
def test_a_file_that_names_no_cut_is_cut_as_gpt_2_and_said_so(cut, tmp_path, caplog) -> None:
    original = trained("gpt-2")
    write_with(tmp_path / "model.gguf", add_bpe(original, cut), size=original.get_vocab_size())
    _, tokenizer = read_gguf(tmp_path / "model.gguf")
    assert [ids(tokenizer, text) for text in TEXTS] == [original.encode(text).ids for text in TEXTS]
    assert "does not name the cut of its text (tokenizer.ggml.pre)" in caplog.text


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (True, True), (False, True)])
def test_the_file_says_whether_texts_start_and_end(bos, eos, tmp_path) -> None:
    original = trained("llama-bpe")
    write_with(
        tmp_path / "model.gguf",
        add_bpe(original, "llama-bpe"),
        more=lambda w: (w.add_add_bos_token(bos), w.add_add_eos_token(eos)),
        size=original.get_vocab_size(),
    )
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "out")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("In 1999").input_ids == [0] * bos + original.encode("In 1999").ids + [1] * eos


SENTENCES = ["the ship sailed over the sea", "the  sea, the sea: 1999 ships", "a ship, a shape"]


def sentencepiece_like(add_space: bool) -> Tokenizer:
    """As a LLaMA 2 tokenizer.json: spaces become U+2581, other characters bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    trainer = trainers.BpeTrainer(vocab_size=120, show_progress=False, min_frequency=1)
    learner = Tokenizer(BPE())
    learner.train_from_iterator([text.replace(" ", "\u2581") for text in SENTENCES], trainer)
    model = json.loads(learner.to_str())["model"]
    for left, right in model["merges"]:
        vocab.setdefault(left + right, len(vocab))
    for token in model["vocab"]:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("\u2581")] if add_space else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in list(vocab)[:3]])
    return tokenizer


def add_sentencepiece(tokenizer: Tokenizer, **booleans: bool):
    def add(writer) -> None:
        tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
        kinds = [gguf.TokenType.UNKNOWN] + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.BYTE] * 256
        kinds += [gguf.TokenType.NORMAL] * (len(tokens) - len(kinds))
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores([0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)])
        writer.add_token_types(kinds)
        for name, index in (("unk", 0), ("bos", 1), ("eos", 2)):
            getattr(writer, f"add_{name}_token_id")(index)
        for name, value in booleans.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)

    return add


@pytest.mark.parametrize("add_space", [True, False, None])
def test_sentencepiece_ids(add_space, tmp_path) -> None:
    original = sentencepiece_like(add_space is not False)
    booleans = {} if add_space is None else {"add_space_prefix": add_space}
    size = original.get_vocab_size()
    write_with(tmp_path / "model.gguf", add_sentencepiece(original, **booleans), size=size)
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "out")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*SENTENCES, "the</s> sea", " ship 海\n", "  the ship "]:
        assert ids(tokenizer, text) == original.encode(text, add_special_tokens=False).ids
        assert tokenizer(text).input_ids == [1, *ids(tokenizer, text)]
        assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False).strip() == text.strip()
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (lambda w: w.add_bool("tokenizer.ggml.remove_extra_whitespaces", True), "remove_extra_whitespaces true"),
        (lambda w: w.add_bool("tokenizer.ggml.add_sep_token", True), "tokenizer.ggml.add_sep_token true"),
        (lambda w: w.add_bool("tokenizer.ggml.add_space_prefix", True), "tokenizer.ggml.add_space_prefix true"),
        (lambda w: w.add_uint32("tokenizer.ggml.add_bos_token", 1), "add_bos_token 1; allowed: true, false"),
        (lambda w: w.add_precompiled_charsmap(b"abc"), "tokenizer.ggml.precompiled_charsmap, which is not known"),
        (lambda w: w.add_fim_pre_token_id(5000), "tokenizer.ggml.fim_pre_token_id 5000, and"),
    ],
)
def test_what_is_not_done_is_refused(more, message, tmp_path) -> None:
    original = trained("gpt-2")
    write_with(tmp_path / "model.gguf", add_bpe(original, "gpt-2"), more=more, size=original.get_vocab_size())
    with pytest.raises(ValueError, match=message):
        read_gguf(tmp_path / "model.gguf")


def test_an_unknown_cut_is_refused_with_the_list(tmp_path, capsys) -> None:
    original = trained("gpt-2")
    write_with(tmp_path / "model.gguf", add_bpe(original, "superbpe"), size=original.get_vocab_size())
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "unknown tokenizer.ggml.pre 'superbpe'" in error
    assert "llama-bpe" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_other_models_of_tokenizer_are_refused(tmp_path) -> None:
    def add(writer) -> None:
        writer.add_tokenizer_model("t5")
        writer.add_token_list([f"token {index}" for index in range(262)])

    write_with(tmp_path / "model.gguf", add, size=262)
    with pytest.raises(ValueError, match=r"unknown tokenizer.ggml.model 't5'; Allowed: llama, gpt2"):
        read_gguf(tmp_path / "model.gguf")


def test_lists_that_do_not_fit_together_are_refused(tmp_path) -> None:
    def add(tokens, merges):
        def write_it(writer) -> None:
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre("gpt-2")
            writer.add_token_list(tokens)
            writer.add_token_merges(merges)

        return write_it

    for tokens, merges, message in (
        (["a", "b", "a"], ["a b"], r"the token 'a' twice"),
        (["a", "b", "ab"], ["a c"], r"the merge 'a c' of tokens that it does not list"),
        (["a", "b", "ab"] * 100, ["a b"], r"lists 300 tokens in tokenizer.ggml.tokens, and its embedding has 262 rows"),
    ):
        write_with(tmp_path / "model.gguf", add(tokens, merges), size=262)
        with pytest.raises(ValueError, match=message):
            read_gguf(tmp_path / "model.gguf")
