"""GGUF files: the weights and the tokenizer that went in come out, and a bad file is refused in one line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import oncelm
from oncelm.cli import main
from oncelm.models.gguf import is_gguf, read_gguf
from tests.models.gguf.files import CHAT_TEMPLATE, logits, make_llama, write


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(make_llama(), tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def test_logits_are_those_of_the_weights(file) -> None:
    model, _ = read_gguf(file)
    assert model.config.num_key_value_heads == 2
    torch.testing.assert_close(logits(model), logits(make_llama()), rtol=0, atol=1e-5)


def test_a_file_is_a_model_by_its_name(file) -> None:
    assert oncelm.describe(file).to_dict() == oncelm.build(file, weights=False).config.to_dict()
    torch.testing.assert_close(logits(oncelm.build(file, "cpu")), logits(make_llama()), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="for mem_layers make a folder of it"):
        oncelm.describe(file, mem_layers=[1])
    assert main(["info", str(file)]) == 0
    assert oncelm.load_tokenizer(file).get_vocab() == read_gguf(file)[1].get_vocab()


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
        (
            {"rope_dimension_count": 8},
            r"head_count 4: of dimension 8 .* \(the dimension is by llama.rope.dimension_count\)",
        ),
        ({"block_count": 1}, "llama.block_count 1 and the tensors of 2 blocks"),
        ({"block_count": 3}, "llama.block_count 3 and the tensors of 2 blocks"),
        ({"embedding_length": 32}, r"weight is \[262, 64\], its metadata asks for \[262, 32\]"),
        ({"feed_forward_length": 32}, r"blk.0.ffn_gate.weight is \[96, 64\], its metadata asks for \[32, 64\]"),
        ({"vocab_size": 100}, r"weight is \[262, 64\], its metadata asks for \[100, 64\]"),
        ({"block_count": 10**6}, "llama.block_count 1000000 and the tensors of 2 blocks"),
        ({"embedding_length": 10**9}, r"token_embd.weight is \[262, 64\], its metadata asks for \[262, 1000000000\]"),
        (
            {"feed_forward_length": 2**32 - 1},
            r"ffn_gate.weight is \[96, 64\], its metadata asks for \[4294967295, 64\]",
        ),
        ({"vocab_size": 2**32 - 1}, r"weight is \[262, 64\], its metadata asks for \[4294967295, 64\]"),
        ({"key_length": 8}, "head_count 4: of dimension 8 they are 32 rows of blk.0.attn_q.weight"),
        ({"value_length": 8}, "llama.attention.value_length 8 and heads of dimension 16"),
        ({"key_length": 16, "rope_dimension_count": 8}, "llama.rope.dimension_count 8 and heads of dimension 16"),
        ({"layer_norm_rms_eps": None}, "layer_norm_rms_epsilon must be a number above 0"),
        ({"rope_freq_base": -1.0}, "llama.rope.freq_base must be a number above 0, got -1.0"),
        ({"pad_token_id": 262}, "tokenizer.ggml.padding_token_id 262: its 262 tokens are 0 to 261"),
        ({"eot_token_id": 2**32 - 1}, "tokenizer.ggml.eot_token_id 4294967295: its 262 tokens are 0 to 261"),
        ({"context_length": None}, "llama.context_length must be a whole number of at least 1, got None"),
    ],
)
def test_metadata_that_are_not_the_tensors(metadata, message, tmp_path) -> None:
    write(make_llama(), tmp_path / "model.gguf", **metadata)
    with pytest.raises(ValueError, match=message) as refused:
        read_gguf(tmp_path / "model.gguf")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (lambda w: w.add_sliding_window(64), "llama.attention.sliding_window 64, and llama.context_length 128"),
        (lambda w: w.add_attn_logit_softcapping(50.0), r"attn_logit_softcapping 50.0, .* would not honour \(only 0\)"),
        (lambda w: w.add_logit_scale(0.25), r"llama.logit_scale 0.25, .* would not honour \(only 0 or 1\)"),
        (lambda w: w.add_expert_count(8), "llama.expert_count 8"),
        (lambda w: w.add_causal_attention(False), "llama.attention.causal False"),
        (lambda w: w.add_uint32("llama.new_idea", 3), "llama.new_idea 3, which the converted model would not honour"),
        (lambda w: w.add_array("llama.layers_to_skip", [1] * 99), r"llama.layers_to_skip \[1, 1, .*\.\.\."),
        (lambda w: w.add_type("adapter"), "of type 'adapter'"),
        (lambda w: w.add_uint16("split.count", 3), r"one of 3 files of one model \(split.count\)"),
        (lambda w: w.add_tensor("blk.0.attn_q_norm.weight", np.ones(16, "f")), "1 tensors: blk.0.attn_q_norm.weight"),
        (
            lambda w: w.add_tensor("blk.1.ffn_gate_inp.weight", np.ones((8, 64), "f")),
            "blk.1.ffn_gate_inp.weight: no part",
        ),
        (lambda w: w.add_tensor("rope_factors_long.weight", np.ones(8, "f")), "rope_factors_long.weight: no part"),
    ],
)
def test_what_a_llama_would_not_honour(more, message, tmp_path) -> None:
    write(make_llama(), tmp_path / "model.gguf", more=more)
    with pytest.raises(ValueError, match=message) as refused:
        read_gguf(tmp_path / "model.gguf")
    assert "\n" not in str(refused.value)


def test_keys_that_ask_for_nothing(tmp_path, caplog) -> None:
    def more(writer) -> None:
        writer.add_sliding_window(128)
        writer.add_logit_scale(1.0)
        writer.add_expert_count(0)
        writer.add_key_length(16)
        writer.add_value_length(16)
        writer.add_string("llama.tensor_data_layout", "Meta AI original pth")
        writer.add_string("general.author", "nobody")
        writer.add_string("somebody.quantised", "today")
        writer.add_sampling_temp(0.6)

    write(make_llama(), tmp_path / "model.gguf", more=more)
    model, _ = read_gguf(tmp_path / "model.gguf")
    torch.testing.assert_close(logits(model), logits(make_llama()), rtol=0, atol=1e-5)
    assert "not read: somebody.quantised, general.sampling.temp." in caplog.text


@pytest.mark.parametrize(
    ("settings", "without"),
    [
        ({"attention_bias": True, "mlp_bias": True}, ()),
        ({"attention_bias": True}, ("attn_output.bias",)),
        ({"tie_word_embeddings": True}, ()),
        ({"head_dim": 32, "num_key_value_heads": 1}, ()),
        ({"rms_norm_eps": 0.3, "rope_theta": 123.456}, ()),
    ],
)
def test_other_kinds_of_llama(settings, without, tmp_path) -> None:
    model = make_llama(**settings)
    if without:
        for layer in model.model.layers:
            torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    write(model, tmp_path / "model.gguf", without=without)
    converted, _ = read_gguf(tmp_path / "model.gguf")
    torch.testing.assert_close(logits(converted), logits(model), rtol=0, atol=1e-5)
    assert converted.config.rms_norm_eps == model.config.rms_norm_eps
    assert converted.config.rope_parameters == model.config.rope_parameters


def test_a_missing_tensor_is_named(tmp_path) -> None:
    write(make_llama(), tmp_path / "model.gguf", without=("blk.1.ffn_up",))
    with pytest.raises(ValueError, match=r"lacks 1 tensors: blk\.1\.ffn_up\.weight"):
        read_gguf(tmp_path / "model.gguf")


def test_a_name_with_mistral_in_it_stays_a_llama(tmp_path) -> None:
    write(make_llama(), tmp_path / "model.gguf", more=lambda writer: writer.add_name("mistral"))
    assert read_gguf(tmp_path / "model.gguf")[0].config.model_type == "llama"


def test_metadata_with_defaults(tmp_path) -> None:
    write(make_llama(), tmp_path / "model.gguf", rope_dimension_count=None, vocab_size=None)
    model, _ = read_gguf(tmp_path / "model.gguf")
    torch.testing.assert_close(logits(model), logits(make_llama()), rtol=0, atol=1e-5)


def test_answers_end_at_every_end_token(tmp_path) -> None:
    write(make_llama(), tmp_path / "model.gguf", eot_token_id=3, eom_token_id=2)
    assert main(["convert", str(tmp_path / "model.gguf"), str(tmp_path / "out")]) == 0
    model = oncelm.load(tmp_path / "out")
    assert model.generation_config.eos_token_id == model.config.eos_token_id == [2, 3]
    assert model.config.bos_token_id == 0


def test_options_that_make_no_sense(file, tmp_path, capsys) -> None:
    for more in (["--to", "official"], ["--tokenizer", "bytes"]):
        assert main(["convert", str(file), str(tmp_path / "out"), *more]) == 2
        assert "becomes a Hugging Face folder" in capsys.readouterr().err


def test_without_the_package(file, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert is_gguf(file)
    with pytest.raises(ImportError, match=r"pip install 'oncelm\[gguf\]'"):
        read_gguf(file)
