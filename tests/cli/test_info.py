"""`oncelm info`: true figures, from the configuration alone."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    Qwen3Config,
    T5Config,
)

import oncelm
from oncelm.cli import main
from oncelm.cli.info import CACHE_LENGTHS, count_parameters, describe, llama_cache_bytes
from oncelm.models.size import empty_model
from oncelm.models.yoco.official import WEIGHTS, write_official
from oncelm.models.yoco.presets import PRESETS
from oncelm.ops.dispatch import TABLE
from tests.models.small import KINDS, make_long, make_model


@pytest.fixture
def info(capsys, monkeypatch):
    """Run the verb; returns what it printed, on one line."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> str:
        assert main(["info", *arguments]) == 0
        return " ".join(capsys.readouterr().out.split())

    return call


def test_the_installation(info) -> None:
    shown = info()
    assert f"torch {torch.__version__}" in shown
    for op, rows in TABLE.items():
        assert f"{op} {rows[0].backend}" in shown
        assert all(row.backend in shown for row in rows)
    assert all(name in shown for name in PRESETS)
    assert "yoco-3b 26 3,072 3,445,303,296 2,829,133,824" in shown


def test_a_preset(info) -> None:
    shown = info("yoco-3b")
    assert "self-decoder 13 layers of gated retention, 24 heads of 128" in shown
    assert "cross-decoder 13 layers of attention, 24 heads of 128, 8 shared key/value heads" in shown
    assert "parameters 3,445,303,296; 2,829,133,824 without embeddings" in shown
    assert "weights 12.8 GiB in float32, 6.4 GiB in bfloat16 context length 4,096 tokens" in shown
    assert "none beside it; the vocabulary is cl100k_base's" in shown
    assert "Cache of one sequence, in bfloat16" in shown
    assert "1M 4.0 GiB 104.0 GiB 25.9" in shown


@pytest.mark.parametrize("kind", KINDS)
def test_figures_are_those_of_the_real_model(kind, info, tmp_path) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    ends = {
        parameter.data_ptr(): parameter for parameter in (model.embed_tokens.weight, model.output_projection.weight)
    }
    inner = model.num_parameters() - sum(parameter.numel() for parameter in ends.values())
    assert count_parameters(empty_model(model.config)) == (model.num_parameters(), inner)
    shown = info(str(tmp_path))
    assert f"parameters {model.num_parameters():,}; {inner:,} without embeddings" in shown
    assert "in bfloat16; stored in float32" in shown
    cache = model.new_cache(1, CACHE_LENGTHS["4K"]).nbytes()
    measure = f"{cache / 2**20:.1f} MiB" if cache >= 2**20 else f"{cache / 2**10:.1f} KiB"
    assert f"4K {measure} " in shown


def test_a_window_a_layout_and_a_tokenizer(info, tmp_path) -> None:
    make_model("window-interleaved", num_self_key_value_heads=1).save_pretrained(tmp_path)
    oncelm.load_tokenizer("bytes").save_pretrained(tmp_path)
    shown = info(str(tmp_path))
    assert "2 layers of sliding-window attention, 2 heads of 16, 1 key/value heads, window 5" in shown
    assert "layout interleaved" in shown
    assert re.search(r"tokenizer \w+, 260 tokens", shown)
    make_model("hybrid").save_pretrained(tmp_path)
    shown = info(str(tmp_path))
    assert "self-decoder 1 layer of gated retention" in shown
    assert "self-decoder 1 layer of full attention" in shown


def test_an_official_folder_without_reading_its_weights(info, tmp_path) -> None:
    model = make_model("retention")
    write_official(model, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"")
    assert f"parameters {model.num_parameters():,};" in info(str(tmp_path))


def test_other_architectures(info, tmp_path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path / "llama")
    shown = info(str(tmp_path / "llama"))
    assert "LlamaForCausalLM (llama)" in shown
    assert "layers 3 of 4 heads, 2 key/value heads" in shown
    assert f"parameters {model.num_parameters():,};" in shown
    assert "4K 768.0 KiB" in shown
    cache = model(torch.zeros(1, 10, dtype=torch.long)).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert llama_cache_bytes(config, 10, torch.float32) == held
    MambaConfig(num_hidden_layers=2).save_pretrained(tmp_path / "mamba")
    shown = info(str(tmp_path / "mamba"))
    assert "layers 2 width 768" in shown
    assert "Cache" not in shown


def test_no_memory_is_taken() -> None:
    model = empty_model(oncelm.describe("yoco-13b"))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert len(describe("yoco-13b")) == 2


def test_mistakes_are_one_line(tmp_path, capsys) -> None:
    (tmp_path / "empty").mkdir()
    T5Config().save_pretrained(tmp_path / "t5")
    (tmp_path / "yoco").mkdir()
    (tmp_path / "yoco" / "config.json").write_text(json.dumps({"model_type": "oncelm_yoco", "hiden_size": 3}))
    for model, message in (
        ("yoko-3b", "unknown model 'yoko-3b'; did you mean 'yoco-3b'?"),
        (str(tmp_path / "empty"), "is no model folder"),
        (str(tmp_path / "nowhere"), "no model folder at"),
        (str(tmp_path / "t5"), "Unrecognized configuration class"),
        (str(tmp_path / "yoco"), "'hiden_size'; did you mean 'hidden_size'?"),
    ):
        capsys.readouterr()
        assert main(["info", model]) == 2
        captured = capsys.readouterr()
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""


# -- how weights are stored -------------------------------------------------------------------------------------------


def change_config(folder, **changes) -> None:
    settings = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("make", [lambda: make_model("retention"), make_long])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_dtype_is_that_of_the_file(make, dtype, info, tmp_path) -> None:
    make().to(getattr(torch, dtype)).save_pretrained(tmp_path)
    assert f"in bfloat16; stored in {dtype} context length" in info(str(tmp_path))
    change_config(tmp_path, dtype=None)
    shown = info(str(tmp_path))
    assert f"in bfloat16; stored in {dtype} context length" in shown
    assert f"Cache of one sequence, in {dtype}" in shown
    assert oncelm.load(tmp_path, "cpu").dtype == getattr(torch, dtype)
    change_config(tmp_path, dtype="float64")
    assert f"; stored in {dtype}, loaded in float64 as its configuration says" in info(str(tmp_path))
    assert oncelm.load(tmp_path, "cpu").dtype == torch.float64


def test_several_dtypes_in_several_files(info, tmp_path) -> None:
    model = make_model("retention").bfloat16()
    norms = [parameter.data.float() for name, parameter in model.named_parameters() if "norm" in name]
    for parameter, norm in zip([p for n, p in model.named_parameters() if "norm" in n], norms, strict=True):
        parameter.data = norm
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    small = sum(norm.numel() for norm in norms)
    rest = model.num_parameters() - small
    assert f"stored in bfloat16 ({rest:,} numbers) and float32 ({small:,} numbers), loaded in" in info(str(tmp_path))
    for part in tmp_path.glob("model-*.safetensors"):
        part.write_bytes(part.read_bytes()[:100])
    assert re.search(r"model-0\S+\.safetensors cannot be read \(", info(str(tmp_path)))
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    assert "model.safetensors.index.json names no files of weights" in info(str(tmp_path))


def test_pickles_and_official_folders(info, tmp_path) -> None:
    model = make_model("retention").bfloat16()
    write_official(model, tmp_path / "official")
    assert "stored in bfloat16 context" in info(str(tmp_path / "official"))
    (tmp_path / "official" / WEIGHTS).write_bytes(b"")
    assert f"{WEIGHTS} cannot be read" in info(str(tmp_path / "official"))
    model.config.save_pretrained(tmp_path / "pickle")
    torch.save(model.half().state_dict(), tmp_path / "pickle/pytorch_model.bin")
    assert "stored in float16" in info(str(tmp_path / "pickle"))
    torch.save({"x": change_config}, tmp_path / "pickle/pytorch_model.bin")
    assert "pytorch_model.bin cannot be read (UnpicklingError" in info(str(tmp_path / "pickle"))


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
        Gemma2Config(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
        GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2),
        GptOssConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4),
    ],
    ids=lambda config: config.model_type,
)
def test_folders_of_other_families(config, info, tmp_path) -> None:
    model = AutoModelForCausalLM.from_config(config).bfloat16()
    model.save_pretrained(tmp_path)
    shown = info(str(tmp_path))
    assert f"{type(model).__name__} ({config.model_type})" in shown
    assert "stored in bfloat16 context" in shown


# -- LongLLaMA --------------------------------------------------------------------------------------------------------


def test_a_llama_folder_as_a_longllama(info, tmp_path, capsys) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        max_position_embeddings=2048,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    shown = info(str(tmp_path), "--mem-layers", "1,3")
    assert "LongLlamaForCausalLM (longllama)" in shown
    assert "memory layers 1, 3, kept in the dtype of the model" in shown
    assert "context length 2,048 tokens a window; memory has no limit" in shown
    # float32: local 2048 tokens x 4 layers x 64 numbers, memory 2 layers x 64 numbers a token
    assert "128K 66.0 MiB 128.0 MiB 1.9" in shown
    for arguments, message in (
        ([str(tmp_path), "--mem-layers", "4"], "mem_layers must be layers of the model, 0..3, got [4]"),
        ([str(tmp_path), "--mem-layers", "one"], "as in 8,16,24; got 'one'"),
        (
            ["yoco-tiny", "--mem-layers", "1"],
            "yoco-tiny is a model of type oncelm_yoco; mem_layers is a key of LongLLaMA models",
        ),
        (["--mem-layers", "1"], "--mem-layers goes with a MODEL"),
    ):
        assert main(["info", *arguments]) == 2
        assert message in capsys.readouterr().err
