"""GGUF files: the weights and the tokenizer that went in come out, and a bad file is refused in one line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

import oncelm
from oncelm.cli import main
from oncelm.models.gguf import is_gguf, read_gguf
from tests.models.gguf_files import CHAT_TEMPLATE, logits, make_llama, write


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(make_llama(), tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def test_logits_are_those_of_the_weights(file) -> None:
    model, _ = read_gguf(file)
    assert model.config.num_key_value_heads == 2
    torch.testing.assert_close(logits(model), logits(make_llama()), rtol=0, atol=1e-5)


def test_quantised_weights_are_dequantised(tmp_path) -> None:
    original = make_llama()
    write(original, tmp_path / "q.gguf", quantisation="Q8_0")
    model, _ = read_gguf(tmp_path / "q.gguf")
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, original.state_dict()[name], rtol=0, atol=0.02)
    assert not torch.equal(logits(model), logits(original))


def test_convert_writes_a_folder_with_the_tokenizer(file, tmp_path, capsys) -> None:
    assert main(["convert", str(file), str(tmp_path / "out")]) == 0
    assert "parameters in float32" in capsys.readouterr().out
    torch.testing.assert_close(logits(oncelm.load(tmp_path / "out")), logits(make_llama()), rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    merged = tokenizer("Hi H").input_ids
    assert merged[0] == 260
    assert len(merged) == 3
    assert tokenizer.decode(tokenizer("It's 2026, café").input_ids) == "It's 2026, café"
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 2)
    memory = oncelm.load(tmp_path / "out", mem_layers=[1], last_context_length=128)
    torch.testing.assert_close(logits(memory), logits(make_llama()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.write_bytes(b"no"), "does not start with GGUF"),
        (lambda f: os.truncate(f, 4), "is damaged, or cut off after 4 bytes"),
        (lambda f: f.write_bytes(f.read_bytes()[:4] + b"\x09" + f.read_bytes()[5:]), "version 9"),
        (lambda f: f.write_bytes(f.read_bytes()[:16] + b"\xff" * 8), "is damaged, or cut off after 24 bytes"),
        (lambda f: write(make_llama(), f, architecture="gpt2"), "architecture 'gpt2'; only LLaMA-family"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(file, tmp_path, damage, message, capsys) -> None:
    damage(file)
    assert main(["convert", str(file), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("part", [0.0002, 0.001, 0.01, 0.03, 0.3, 0.999])
def test_a_file_cut_off_anywhere_is_called_cut_off(file, part, capsys) -> None:
    kept = int(file.stat().st_size * part)
    os.truncate(file, kept)
    assert main(["convert", str(file), str(file.parent / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"oncelm: error: {file} is damaged, or cut off after {kept:,} bytes (")
    assert error.count("\n") == 1
    assert not (file.parent / "out").exists()


def test_an_array_longer_than_the_file_is_damage(file) -> None:
    data = file.read_bytes()
    at = data.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type") + 8  # kind, kind of the items
    file.write_bytes(data[:at] + (2**60).to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(ValueError, match=r"is damaged"):
        read_gguf(file)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"head_count": 0}, "llama.attention.head_count must be a whole number of at least 1, got 0"),
        ({"head_count": None}, "llama.attention.head_count must be a whole number of at least 1, got None"),
        ({"head_count": 3}, r"head_count 3: of dimension 16 they are 48 rows of blk.0.attn_q.weight, which has 64"),
        ({"head_count": 8}, r"head_count 8: of dimension 16 they are 128 rows of blk.0.attn_q.weight, which has 64"),
        (
            {"head_count": 8, "rope_dimension_count": None},
            "head_count_kv 2: of dimension 8 they are 16 rows of blk.0.a",
        ),
        ({"head_count_kv": 0}, "llama.attention.head_count_kv must be a whole number of at least 1, got 0"),
        (
            {"head_count_kv": 3},
            "head_count_kv 3: of dimension 16 they are 48 rows of blk.0.attn_k.weight, which has 32",
        ),
        ({"rope_dimension_count": 8}, "head_count 4: of dimension 8 they are 32 rows of blk.0.attn_q.weight"),
        ({"block_count": 1}, "llama.block_count 1 and the tensors of 2 blocks"),
        ({"block_count": 3}, "lacks 9 tensors: model.layers.2."),
        ({"embedding_length": 32}, r"weight is \[262, 64\], its metadata asks for \[262, 32\]"),
        ({"feed_forward_length": 32}, r"down_proj.weight is \[64, 96\], its metadata asks for \[64, 32\]"),
        ({"vocab_size": 100}, r"weight is \[262, 64\], its metadata asks for \[100, 64\]"),
        ({"context_length": None}, "llama.context_length must be a whole number of at least 1, got None"),
    ],
)
def test_metadata_that_are_not_the_tensors(metadata, message, tmp_path) -> None:
    write(make_llama(), tmp_path / "model.gguf", **metadata)
    with pytest.raises(ValueError, match=message) as refused:
        read_gguf(tmp_path / "model.gguf")
    assert "\n" not in str(refused.value)


def test_metadata_with_defaults(tmp_path) -> None:
    write(make_llama(), tmp_path / "model.gguf", rope_dimension_count=None, vocab_size=None)
    model, _ = read_gguf(tmp_path / "model.gguf")
    torch.testing.assert_close(logits(model), logits(make_llama()), rtol=0, atol=1e-5)


def test_options_that_make_no_sense(file, tmp_path, capsys) -> None:
    for more in (["--to", "official"], ["--tokenizer", "bytes"]):
        assert main(["convert", str(file), str(tmp_path / "out"), *more]) == 2
        assert "becomes a Hugging Face folder" in capsys.readouterr().err


def test_without_the_package(file, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert is_gguf(file)
    with pytest.raises(ImportError, match=r"pip install 'oncelm\[gguf\]'"):
        read_gguf(file)


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (
            lambda w: w.add_uint32("llama.expert_count", 8),
            "has llama.expert_count 8, which a Hugging Face LLaMA has not",
        ),
        (lambda w: w.add_uint32("llama.attention.sliding_window", 64), "has llama.attention.sliding_window 64"),
        (lambda w: w.add_float32("llama.logit_scale", 0.5), "has llama.logit_scale 0.5"),
        (lambda w: w.add_float32("llama.attention.scale", 0.1), "has llama.attention.scale, which is not known here"),
        (lambda w: w.add_value_length(8), "has llama.attention.value_length 8; it must be the even size of a head, 16"),
        (
            lambda w: w.add_tensor("blk.1.attn_q.bias", np.ones(64, np.float32)),
            "has blk.1.attn_q.bias, which a Hugging",
        ),
        (lambda w: w.add_tensor("blk.0.attn_q_norm.weight", np.ones(16, np.float32)), "has blk.0.attn_q_norm.weight"),
        (lambda w: w.add_tensor("rope_factors_long.weight", np.ones(8, np.float32)), "has rope_factors_long.weight"),
        (lambda w: w.add_tensor("blk.0.ffn_gate_inp.weight", np.ones((4, 64), np.float32)), "has blk.0.ffn_gate_inp"),
    ],
)
def test_what_a_llama_has_not_is_refused_by_name(add, message, tmp_path, capsys) -> None:
    write(make_llama(), tmp_path / "model.gguf", more=add)
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"block_count": 10**6}, r"lacks 8999982 tensors: model.layers.2.input_layernorm.weight"),
        ({"block_count": 2**32 - 1}, r"lacks 38654705637 tensors"),
        ({"vocab_size": 2**31}, r"weight is \[262, 64\], its metadata asks for \[2147483648, 64\]"),
        ({"embedding_length": 2**31, "rope_dimension_count": 16}, r"its metadata asks for \[262, 2147483648\]"),
        ({"feed_forward_length": 2**31}, r"down_proj.weight is \[64, 96\], its metadata asks for \[64, 2147483648\]"),
        ({"eos_token_id": 2**31}, r"tokenizer.ggml.eos_token_id 2147483648, and 262 tokens: allowed is 0 to 261"),
        ({"eot_token_id": 262}, r"tokenizer.ggml.eot_token_id 262, and 262 tokens"),
        ({"head_count": 2**31, "head_count_kv": None}, "head_count 2147483648: of dimension 16"),
    ],
)
def test_sizes_beyond_the_file_are_refused_at_once(metadata, message, tmp_path) -> None:
    tokens = {name: metadata.pop(name) for name in list(metadata) if name.endswith("_token_id")}
    write(
        make_llama(),
        tmp_path / "model.gguf",
        more=lambda w: [w.add_uint32(f"tokenizer.ggml.{name}", value) for name, value in tokens.items()],
        **metadata,
    )
    start = time.monotonic()
    with pytest.raises(ValueError, match=message):
        read_gguf(tmp_path / "model.gguf")
    assert time.monotonic() - start < 3  # it takes milliseconds; minutes where sizes are believed


@pytest.mark.parametrize(
    "changes", [{"tie_word_embeddings": True}, {"num_key_value_heads": 4}, {"head_dim": 32}, {"num_hidden_layers": 1}]
)
def test_other_shapes_of_model(changes, tmp_path) -> None:
    original = make_llama(**changes)
    every_head = changes.get("num_key_value_heads") == 4
    write(original, tmp_path / "model.gguf", **({"head_count_kv": None} if every_head else {}))
    model, _ = read_gguf(tmp_path / "model.gguf")
    torch.testing.assert_close(logits(model), logits(original), rtol=0, atol=1e-5)
    assert model.config.tie_word_embeddings == original.config.tie_word_embeddings


def test_the_size_of_a_head_may_stand_in_key_length(tmp_path) -> None:
    original = make_llama(head_dim=32)
    write(original, tmp_path / "model.gguf", rope_dimension_count=None, key_length=32, value_length=32)
    model, _ = read_gguf(tmp_path / "model.gguf")
    torch.testing.assert_close(logits(model), logits(original), rtol=0, atol=1e-5)


def test_ends_of_a_turn_end_generation(tmp_path) -> None:
    write(make_llama(), tmp_path / "model.gguf", more=lambda w: (w.add_eot_token_id(260), w.add_eom_token_id(2)))
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "out")]) == 0
    written = GenerationConfig.from_pretrained(tmp_path / "out")
    assert written.eos_token_id == [2, 260]
    assert written.bos_token_id == 0
