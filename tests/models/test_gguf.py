"""GGUF files: the weights and the tokenizer that went in come out, and a bad file is refused in one line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import oncelm
from oncelm.cli import main
from oncelm.models.gguf import is_gguf, read_gguf

gguf = pytest.importorskip("gguf", reason="needs `pip install gguf`")

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=262,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rope_theta=5000.0,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp orders them: dimension j beside dimension j + D/2."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(
    model: LlamaForCausalLM,
    file: Path,
    architecture: str = "llama",
    quantisation: str | None = None,
    **metadata: int | None,
) -> None:
    """A GGUF file of the model, with these numbers of its metadata changed, or left out where None."""
    config = model.config
    writer = gguf.GGUFWriter(str(file), architecture)
    sizes = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "rope_dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    for name, size in (sizes | metadata).items():
        if size is not None:
            getattr(writer, f"add_{name}")(size)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    tokenizer = oncelm.load_tokenizer("bytes")
    tokens = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__), "Hi", "He"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.NORMAL] * 258)
    writer.add_token_merges(["H i", "H e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in model.state_dict().items():
        short = name.split(".", 3)[3] if "layers" in name else name
        array = tensor.numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:
                array = interleaved(array, heads)
        target = f"blk.{name.split('.')[2]}.{NAMES[short]}" if "layers" in name else NAMES[name]
        if quantisation and array.ndim == 2:
            kind = gguf.GGMLQuantizationType[quantisation]
            writer.add_tensor(target, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write(make_llama(), tmp_path / "model.gguf")
    return tmp_path / "model.gguf"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 60)[None], use_cache=False).logits


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
