"""`oncelm generate`: the continuation is the model's own, however the prompt came in, and mistakes are one line."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from oncelm import load_tokenizer
from oncelm.cli import main
from oncelm.cli.printer import Printer
from oncelm.data.detokenize import TextStream
from oncelm.models.yoco.official import write_official
from tests.data.test_detokenize import sentencepiece_like
from tests.models.small import make_long, make_model

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely: \u00e9t\u00e9 \u65e5\u672c."


@pytest.fixture(scope="module")
def yoco(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "yoco"
    make_model("retention", vocab_size=260, max_position_embeddings=256, eos_token_id=None).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=260, eos_token_id=None, **shape)).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


@pytest.fixture
def generate(capsys) -> Callable[..., str]:
    """Run the verb; returns what went to standard output."""

    def call(model: Path, *options: str) -> str:
        capsys.readouterr()
        assert main(["generate", "--model", str(model), "--device", "cpu", *options]) == 0
        captured = capsys.readouterr()
        call.summary = captured.err
        return captured.out

    return call


def expected(model: torch.nn.Module, text: str, tokens: int) -> str:
    """Greedy, without a cache."""
    tokenizer = load_tokenizer("bytes")
    ids = tokenizer(text, return_tensors="pt").input_ids
    prompt = ids.shape[1]
    for _ in range(tokens):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return tokenizer.decode(ids[0, prompt:], skip_special_tokens=True) + "\n"


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, "1", "7", "1000"])
@pytest.mark.parametrize("text", [TEXT, "a"])
def test_it_continues_as_the_model_does(text, chunk, yoco, generate) -> None:
    options = () if chunk is None else ("--prefill-chunk-size", chunk)
    model = make_model("retention", vocab_size=260)
    assert generate(yoco, "--prompt", text, "--max-new-tokens", "20", *options) == expected(model, text, 20)


def test_a_summary_on_standard_error(yoco, generate) -> None:
    generate(yoco, "--prompt", TEXT, "--max-new-tokens", "5")
    count = len(TEXT.encode())
    lines = [
        rf"prompt       {count} tokens",
        r"prefill      [\d.]+ s, [\d,]+ tokens/s",
        r"first token  after [\d.]+ s",
        r"decode       5 tokens, [\d,.]+ tokens/s",
        r"cache        [\d.]+ KiB",
    ]
    assert re.fullmatch("\n".join(lines) + "\n", generate.summary)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8", "int8"])
def test_a_narrower_cache(kv_dtype, yoco, llama, generate, tmp_path, capsys) -> None:
    file, narrow = str(tmp_path / "cache"), ("--kv-dtype", kv_dtype)
    wanted = generate(yoco, "--prompt", TEXT + "?", "--max-new-tokens", "5", *narrow)
    assert len(wanted) > 1
    generate(yoco, "--prompt", TEXT, "--max-new-tokens", "0", "--save-cache", file, *narrow)
    loaded = ("--load-cache", file, "--prompt", "?", "--max-new-tokens", "5")
    assert generate(yoco, *loaded, *narrow) == wanted
    assert generate(yoco, *loaded) == wanted  # the file says what it holds
    for other in {"float8", "int8", "bfloat16"} - {kv_dtype}:
        message = f"--kv-dtype {other} does not fit {file}, whose keys and values are "
        assert_refused(capsys, ["--model", str(yoco), *loaded, "--kv-dtype", other], message)
    assert_refused(
        capsys, ["--model", str(llama), "--prompt", "a", *narrow], "--kv-dtype is for YOCO and LongLLaMA models"
    )


def test_a_file_and_standard_input(yoco, generate, tmp_path, monkeypatch) -> None:
    wanted = generate(yoco, "--prompt", TEXT + "\r\n", "--max-new-tokens", "9")
    (tmp_path / "prompt.txt").write_bytes(f"{TEXT}\r\n".encode())
    assert generate(yoco, "--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "9") == wanted
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{TEXT}\r\n".encode())))
    assert generate(yoco, "--prompt-file", "-", "--max-new-tokens", "9") == wanted


def test_a_byte_order_mark_is_no_text(yoco, generate, tmp_path, monkeypatch) -> None:
    wanted, content = generate(yoco, "--prompt", TEXT, "--max-new-tokens", "9"), TEXT.encode("utf-8-sig")
    (tmp_path / "prompt.txt").write_bytes(content)
    assert generate(yoco, "--prompt-file", str(tmp_path / "prompt.txt"), "--max-new-tokens", "9") == wanted
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert generate(yoco, "--prompt-file", "-", "--max-new-tokens", "9") == wanted


def test_a_prompt_that_begins_with_dashes(yoco, generate) -> None:
    for prompt in ("--- Chapter 1 ---", "---", "-x", "--model-like"):
        wanted = expected(make_model("retention", vocab_size=260), prompt, 5)
        assert generate(yoco, "--prompt", prompt, "--max-new-tokens", "5") == wanted


def test_a_prompt_of_a_locale_without_utf8(yoco, generate) -> None:
    """With LC_ALL=C, Python hands over the bytes of an argument as single characters."""
    typed = TEXT.encode().decode("ascii", "surrogateescape")
    few = ("--max-new-tokens", "5")
    assert generate(yoco, "--prompt", typed, *few) == generate(yoco, "--prompt", TEXT, *few)


def test_special_tokens_that_a_prompt_spells(yoco, tmp_path, generate) -> None:
    """As the tokenizer reads them, unless an option says how."""
    model, own = make_model("retention", vocab_size=260, eos_token_id=None), load_tokenizer("bytes")
    foreign = tmp_path / "foreign"
    model.save_pretrained(foreign)
    tokenizer = load_tokenizer("bytes")
    tokenizer.split_special_tokens = False
    tokenizer.save_pretrained(foreign)

    def prompt_length(folder: Path, *options: str) -> int:
        generate(folder, "--prompt", "a</s>b", "--max-new-tokens", "1", *options)
        return int(re.search(r"prompt +(\d+) tokens", generate.summary)[1])

    as_text, as_token = 6, 3
    assert len(own("a</s>b").input_ids) == as_text
    assert (prompt_length(yoco), prompt_length(foreign)) == (as_text, as_token)
    for folder in (yoco, foreign):
        assert prompt_length(folder, "--special-tokens") == as_token
        assert prompt_length(folder, "--no-special-tokens") == as_text


def test_sampling(yoco, generate) -> None:
    options = ("--prompt", TEXT, "--max-new-tokens", "30", "--temperature")
    greedy = generate(yoco, *options[:-1])
    hot = generate(yoco, *options, "3", "--seed", "1")
    assert hot == generate(yoco, *options, "3", "--seed", "1") != greedy
    assert hot != generate(yoco, *options, "3", "--seed", "2")
    assert generate(yoco, *options, "3", "--top-k", "1") == greedy
    assert generate(yoco, *options, "1", "--top-p", "1e-6") == greedy


def test_end_of_text_ends_it(tmp_path, generate) -> None:
    model = make_model("retention", vocab_size=260)
    words = expected(model, TEXT, 8)
    tokens = load_tokenizer("bytes")(words).input_ids
    model.generation_config.eos_token_id = tokens[3]
    model.save_pretrained(tmp_path)
    stopped = generate(tmp_path, "--prompt", TEXT, "--tokenizer", "bytes", "--max-new-tokens", "8")
    assert len(stopped) <= 5
    assert "decode       8 tokens" not in generate.summary


def test_an_official_folder(tmp_path, generate) -> None:
    model = make_model("retention", vocab_size=260, tie_word_embeddings=True)
    write_official(model, tmp_path / "official")
    options = ("--prompt", TEXT, "--tokenizer", "bytes", "--max-new-tokens", "9", "--dtype", "float64")
    assert generate(tmp_path / "official", *options) == expected(model.double(), TEXT, 9)


def test_a_longer_prompt_than_the_training_is_warned_of(yoco, generate) -> None:
    generate(yoco, "--prompt", "a" * 256, "--max-new-tokens", "1")
    assert "warning" not in generate.summary
    generate(yoco, "--prompt", "a" * 1257, "--max-new-tokens", "1")
    warnings = [line for line in generate.summary.splitlines() if "warning" in line]
    assert warnings == [
        "oncelm: warning: 1,257 tokens to read, but the model was trained on 256 (max_position_embeddings); "
        "quality may suffer."
    ]


def test_another_architecture(llama, generate) -> None:
    model = LlamaForCausalLM.from_pretrained(llama)
    wanted = expected(model, TEXT, 12)
    for options in ((), ("--prefill-chunk-size", "10")):
        assert generate(llama, "--prompt", TEXT, "--max-new-tokens", "12", *options) == wanted
    assert "cache" in generate.summary


# -- a document that was read once ------------------------------------------------------------------------------------


def test_a_saved_cache_is_the_document(yoco, generate, tmp_path) -> None:
    document, file, again = TEXT * 3, str(tmp_path / "document.cache"), str(tmp_path / "more.cache")
    few = ("--max-new-tokens", "12")
    assert generate(yoco, "--prompt", document, "--max-new-tokens", "0", "--save-cache", file) == ""
    assert f"{3 * len(TEXT.encode())} tokens in {file}" in generate.summary
    for question in ("?", "And then", "What"):
        assert generate(yoco, "--load-cache", file, "--prompt", question, *few) == generate(
            yoco, "--prompt", document + question, *few
        )
    # on from there, twice; saving changes nothing about what is written
    asked = generate(yoco, "--load-cache", file, "--prompt", " x", "--save-cache", again, *few)
    assert asked == generate(yoco, "--prompt", document + " x", *few)
    assert generate(yoco, "--load-cache", again, "--prompt", " y", *few) == generate(
        yoco, "--prompt", document + " x y", *few
    )


def test_a_bad_cache_file(yoco, generate, tmp_path, capsys) -> None:
    file = tmp_path / "document.cache"
    generate(yoco, "--prompt", TEXT, "--max-new-tokens", "0", "--save-cache", str(file))
    other = tmp_path / "other"
    make_model("window", vocab_size=260).save_pretrained(other)
    load_tokenizer("bytes").save_pretrained(other)
    options = ["--prompt", "a", "--load-cache"]
    for model, named, message in (
        (other, file, "was computed by another model"),
        (yoco, tmp_path / "none.cache", "no cache file at"),
        (yoco, yoco / "config.json", "is not a readable cache file"),
        (yoco, yoco / "model.safetensors", "is not an OnceLM cache file"),
    ):
        assert_refused(capsys, ["--model", str(model), *options, str(named)], message)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert_refused(capsys, ["--model", str(yoco), *options, str(file)], "is damaged: its checksum")


# -- mistakes ---------------------------------------------------------------------------------------------------------


def assert_refused(capsys, options: list[str], message: str) -> None:
    capsys.readouterr()
    assert main(["generate", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("oncelm: error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--max-new-tokens", "-1"], "--max-new-tokens must be a whole number of at least 0, got -1"),
        (["--prompt", "a", "--temperature", "-0.1"], "--temperature must be a number of at least 0, got -0.1"),
        (["--prompt", "a", "--max-new-tokens", "1000000000000"], "tokens would take"),
        (["--prompt", "a", "--seed", "-1"], "--seed must be a whole number of at least 0, got -1"),
        (["--prompt", "a", "--seed", "1" + "0" * 30], "--seed must be at most 9223372036854775807"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature must be a number of at least 0, got nan"),
        (
            ["--prompt", "a", "--temperature", "1", "--top-p", "1.1"],
            "--top-p must be a number above 0 and at most 1",
        ),
        (
            ["--prompt", "a", "--temperature", "1", "--top-k", "0"],
            "--top-k must be a whole number of at least 1",
        ),
        (["--prompt", "a", "--top-p", "0.9"], "give a --temperature above 0"),
        (
            ["--prompt", "a", "--prefill-chunk-size", "0"],
            "--prefill-chunk-size must be a whole number",
        ),
        (["--prompt", "a", "--dtype", "floot32"], "unknown dtype 'floot32'; did you mean 'float32'?"),
        (["--prompt", "a", "--kv-dtype", "int9"], "unknown kv-dtype 'int9'; did you mean 'int8'?"),
        (["--prompt", "a", "--device", "gpu"], "unknown device 'gpu'; did you mean 'cpu'?"),
        (["--prompt", "a", "--tokenizer", "byte"], "unknown tokenizer 'byte'; did you mean 'bytes'?"),
        (["--prompt", "a", "--save-cache", "."], "--save-cache . is a folder; name a file"),
        (["--prompt-file", "no-such-file.txt"], "No such file or directory: 'no-such-file.txt'"),
    ],
)
def test_bad_options(options, message, yoco, capsys) -> None:
    assert_refused(capsys, ["--model", str(yoco), *options], message)


def test_bad_text(yoco, tmp_path, capsys) -> None:
    (tmp_path / "text").write_bytes(b"abc\xff")
    assert_refused(capsys, ["--model", str(yoco), "--prompt-file", str(tmp_path / "text")], "text is not UTF-8 text:")
    (tmp_path / "text").write_bytes(b"")
    assert_refused(capsys, ["--model", str(yoco), "--prompt-file", str(tmp_path / "text")], "the prompt is empty")


def test_a_bad_model_or_tokenizer(yoco, llama, tmp_path, capsys) -> None:
    prompt = ["--prompt", "\u00ff"]
    assert_refused(capsys, ["--model", str(tmp_path / "nowhere"), *prompt], "no model folder at")
    make_model("retention").save_pretrained(tmp_path / "small")
    assert_refused(capsys, ["--model", str(tmp_path / "small"), *prompt], "Name one with --tokenizer.")
    bytes_too = ["--model", str(tmp_path / "small"), "--tokenizer", "bytes", *prompt]
    assert_refused(capsys, bytes_too, "the tokenizer gives token 199, but the model knows 61 tokens only")
    for option in ("--save-cache", "--load-cache"):
        with_cache = ["--model", str(llama), *prompt, option, str(tmp_path / "x")]
        assert_refused(capsys, with_cache, "are for YOCO and LongLLaMA models")


# -- text in pieces ---------------------------------------------------------------------------------------------------


def test_what_is_streamed_continues_the_prompt(tmp_path, generate) -> None:
    """A model that repeats: the prompt ends in byte tokens, and so does each character that it writes."""
    folder = tmp_path / "fallback"
    tokenizer = sentencepiece_like()
    model = make_model("retention", vocab_size=len(tokenizer), eos_token_id=None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prompt = "\u65e5\u672c"
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    stream = TextStream(tokenizer, ids[0].tolist())
    wanted = "".join(map(stream.add, answer)) + stream.end()
    assert generate(folder, "--prompt", prompt, "--max-new-tokens", "12") == wanted + "\n"


def test_a_character_comes_whole_and_at_once(capsys) -> None:
    tokenizer, shown = load_tokenizer("bytes"), []
    printer = Printer(tokenizer, [])
    for token in tokenizer("a\u65e5b").input_ids:
        printer.put(torch.tensor([token]))
        shown.append(capsys.readouterr().out)
    assert shown == ["a", "", "", "\u65e5", "b"]


# -- LongLLaMA --------------------------------------------------------------------------------------------------------


@pytest.fixture
def long(tmp_path) -> Path:
    """A LongLLaMA with windows of 16 tokens."""
    folder = tmp_path / "long"
    make_long(vocab_size=260).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


def test_longllama(long, generate) -> None:
    options = ("--prompt", TEXT * 3, "--max-new-tokens", "12")
    wanted = generate(long, *options)
    assert "warning" not in generate.summary
    for memory in ("exact", "cpu", "disk"):
        assert generate(long, *options, "--memory", memory) == wanted
    generate(long, *options, "--kv-dtype", "int8")
    model = make_long(vocab_size=260)
    ids = load_tokenizer("bytes")(TEXT * 3, return_tensors="pt").input_ids
    cache = model.new_cache(1)
    model.prefill(ids[:, :-1], cache, last_context_length=3)
    written = []
    step = ids[:, -1:]
    for _ in range(12):
        step = model(step, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        written.append(step.item())
    text = load_tokenizer("bytes").decode(written, skip_special_tokens=True)
    assert generate(long, *options, "--last-context-length", "3") == text + "\n"


def test_longllama_keeps_a_document(long, generate, tmp_path) -> None:
    """Asked again without reading it again; saving changes nothing about what is written."""
    file, few = str(tmp_path / "document.cache"), ("--max-new-tokens", "12")
    assert generate(long, "--prompt", TEXT * 3, "--save-cache", file, *few) == generate(
        long, "--prompt", TEXT * 3, *few
    )
    first, again = (generate(long, "--load-cache", file, "--prompt", "And then", *few) for _ in range(2))
    assert first == again
    assert generate(long, "--load-cache", file, "--prompt", "And then", "--memory", "cpu", *few) == first


@pytest.mark.parametrize("memory", ["exact", "cpu"])
def test_longllama_goes_on_in_the_dtype_of_the_file(memory, long, generate, tmp_path, capsys) -> None:
    file, place = str(tmp_path / "document.cache"), ("--memory", memory)
    generate(long, "--prompt", TEXT * 3, "--max-new-tokens", "0", "--save-cache", file, "--kv-dtype", "int8", *place)
    options = ("--load-cache", file, "--prompt", "And then", "--max-new-tokens", "12", *place)
    wanted = generate(long, *options, "--kv-dtype", "int8")
    held = re.search(r"cache .*", generate.summary)[0]
    assert generate(long, *options) == wanted
    assert re.search(r"cache .*", generate.summary)[0] == held
    message = f"--kv-dtype bfloat16 does not fit {file}, whose keys and values are int8; leave it out."
    assert_refused(capsys, ["--model", str(long), *options, "--kv-dtype", "bfloat16"], message)


def test_longllama_options(long, llama, yoco, generate, capsys) -> None:
    assert generate(llama, "--mem-layers", "0", "--prompt", TEXT, "--max-new-tokens", "5")
    for model, arguments, message in (
        (long, ["--prefill-chunk-size", "4"], "they read window by window"),
        (long, ["--last-context-length", "17"], "from 1 to the model's window of 16, got 17"),
        (long, ["--last-context-length", "0"], "from 1 to the model's window of 16, got 0"),
        (long, ["--memory", "cpus"], "did you mean 'cpu'"),
        (long, ["--mem-layers", "0"], "are not the checkpoint's"),
        (llama, ["--memory", "cpu"], "With mem_layers it is read as a LongLLaMA"),
        (long, ["--kv-dtype", "float8"], "--kv-dtype float8 is not for LongLLaMA models: auto, bfloat16 or int8"),
        (
            llama,
            ["--mem-layers", "0", "--kv-dtype", "float8"],
            "--kv-dtype float8 is not for LongLLaMA models: auto, bfloat16 or int8",
        ),
        (llama, ["--mem-layers", "99"], "mem_layers must be layers of the model"),
        (yoco, ["--mem-layers", "1"], "mem_layers is a key of LongLLaMA models"),
    ):
        assert main(["generate", "--model", str(model), "--prompt", TEXT, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
