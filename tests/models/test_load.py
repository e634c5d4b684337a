"""`load` with Hugging Face folders: the same logits back, and every bad folder refused in one clear line."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config

import oncelm
from oncelm.models.load import errors_in_one_line, quiet_transformers, read_config
from oncelm.models.longllama.config import LLAMA_SIZES
from oncelm.utils.checksums import write_checksums
from tests.models.small import KINDS, make_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A YOCO model in a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    with quiet_transformers():
        oncelm.build_model("yoco-tiny", vocab_size=300, intermediate_size=64).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A copy of it to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None], use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_model_is_the_same_model(kind, tmp_path) -> None:
    model = make_model(kind)
    model.save_pretrained(tmp_path)
    loaded = oncelm.load(tmp_path, device="cpu")
    assert not loaded.training
    assert loaded.fingerprint() == model.fingerprint()
    assert torch.equal(logits(loaded), logits(model))


def test_dtype_and_shards(tmp_path) -> None:
    model = make_model("retention")
    model.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert oncelm.load(tmp_path).dtype == torch.bfloat16
    wide = oncelm.load(str(tmp_path), device="cpu", dtype="float32")
    assert wide.dtype == torch.float32
    assert torch.equal(logits(wide), logits(model.float()))


def test_another_architecture(tmp_path, caplog) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update({"extra.weight": torch.ones(2)}))
    with caplog.at_level(logging.WARNING):
        assert isinstance(oncelm.load(tmp_path), LlamaForCausalLM)
    assert "has 1 unexpected tensors: extra.weight" in caplog.text
    edit_weights(tmp_path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"model.norm.weight is \[2\], config.json asks for \[16\]"):
        oncelm.load(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(ValueError, match=r"has 1 missing tensors: model.norm.weight"):
        oncelm.load(tmp_path)


# -- bad folders ------------------------------------------------------------------------------------------------------


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def keep_first_shard(folder: Path) -> None:
    oncelm.load(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    sorted(folder.glob("model-*.safetensors"))[-1].unlink()


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "is no model folder: it needs config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON: Expecting property"),
    "config not text": (lambda f: (f / "config.json").write_bytes(b"\xff\x00"), "config.json is not JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[1]"), "describes no model: it must be a JSON object"),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), "with a key model_type"),
    "unknown model type": (lambda f: edit_config(f, model_type="yocco"), "has model type `yocco`"),
    "unknown key": (lambda f: edit_config(f, widow_size=3), "'widow_size'; did you mean 'window_size'?"),
    "unknown value": (lambda f: edit_config(f, layout="stackt"), "'stackt'; did you mean 'stacked'?"),
    "heads do not divide": (
        lambda f: edit_config(f, num_self_heads=3),
        "hidden_size 128 does not split into num_self_h",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "empty weights": (lambda f: os.truncate(f / "model.safetensors", 0), "header too small"),
    "truncated weights": (lambda f: os.truncate(f / "model.safetensors", 90_000), "not fully covered"),
    "missing shard": (keep_first_shard, "No such file"),
    "missing tensor": (
        lambda f: edit_weights(f, lambda tensors: tensors.pop("layer_norm.weight")),
        "1 missing tensors: layer_norm.weight",
    ),
    "wrong size": (
        lambda f: edit_weights(f, lambda tensors: tensors.update({"layer_norm.weight": torch.ones(5)})),
        r"layer_norm\.weight.*\[5\].*\[128\]",
    ),
    "unexpected tensor": (
        lambda f: edit_weights(f, lambda tensors: tensors.update({"layer_nrom.weight": torch.ones(5)})),
        "1 unexpected tensors: layer_nrom.weight",
    ),
    "a layer too many": (
        lambda f: edit_config(f, num_self_decoder_layers=3),
        "11 missing tensors: self_decoder.layers.2.",
    ),
    "another width": (lambda f: edit_config(f, hidden_size=256), r"cross_decoder\.k_proj\.weight.*\[64, 128\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_in_one_line(case, folder, capfd) -> None:
    damage, message = BAD[case]
    damage(folder)
    capfd.readouterr()
    with pytest.raises(ValueError, match=message) as refused:
        oncelm.load(folder)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)
    assert capfd.readouterr() == ("", "")  # no report of transformers' on top


class Harmful:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def test_a_pickle_cannot_run_code(folder, tmp_path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"layer_norm.weight": Harmful(tmp_path / "harm")}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="could run code, so it is refused"):
        oncelm.load(folder)
    assert not (tmp_path / "harm").exists()


@pytest.fixture
def llama(tmp_path) -> Path:
    """A plain LLaMA in a folder."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    with quiet_transformers():
        LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(
            ({name: value}, f"{name} must be a whole number of at least 1, got {value!r}.")
            for name in LLAMA_SIZES
            for value in (0, -1, "8", 1.5)
        ),
        ({"hidden_act": "sliu"}, "unknown hidden_act 'sliu'; did you mean 'silu'? Allowed: gelu, "),
        ({"max_position_embeddings": "8"}, "max_position_embeddings must be a whole number of at least 1, got '8'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number above 0 and at most 1, got 'small'"),
        ({"num_attention_heads": 3}, "The hidden size (16) is not a multiple of the number of attention heads (3)."),
        ({"rope_parameters": {"rope_type": "foo"}}, ": KeyError: 'foo'"),
        ({"pad_token_id": 64}, ": AssertionError: Padding_idx must be within num_embeddings"),
    ],
)
def test_a_bad_key_of_a_llama_is_named_with_its_value(changes, message, llama) -> None:
    edit_config(llama, **changes)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        oncelm.load(llama)
    assert "\n" not in str(refused.value)
    assert str(llama) in str(refused.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"max_position_embeddings": "8"}, "max_position_embeddings must be a whole number of at least 1, got '8'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps must be a number above 0 and at most 1, got 'small'"),
        ({"attention_bias": 3}, "attention_bias must be true or false, got 3"),
    ],
)
def test_a_bad_override_is_named_with_its_value(overrides, message, llama) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        oncelm.load(llama, mem_layers=[1], **overrides)
    assert "\n" not in str(refused.value)


def test_absent_keys_of_a_llama_have_defaults(llama) -> None:
    edit_config(llama, head_dim=None, num_key_value_heads=None)
    assert oncelm.load(llama).config.head_dim == 8


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (KeyError("heads"), "KeyError: 'heads'"),
        (ZeroDivisionError("integer modulo by zero"), "ZeroDivisionError: integer modulo by zero"),
        (NotImplementedError(), "NotImplementedError"),
        (RuntimeError("first:\n\n    second\tline  \n"), "first: second line"),
        (TypeError("a" * 500 + "b" * 7000 + "c" * 500), "a" * 500 + " ... " + "c" * 500),
    ],
)
def test_errors_in_one_line(error, reason, tmp_path) -> None:
    with pytest.raises(ValueError, match="cannot load a model from") as refused, errors_in_one_line(tmp_path):
        raise error
    assert str(refused.value) == f"cannot load a model from {tmp_path}: {reason}"
    assert refused.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        SafetensorError("Error while deserializing: I/O error: Cannot allocate memory (os error 12)"),
    ],
)
def test_too_little_memory_is_not_a_damaged_model(error, tmp_path) -> None:
    with pytest.raises(MemoryError, match="no room for the model from") as refused, errors_in_one_line(tmp_path):
        raise error
    assert refused.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_who_ends_the_process_blames_no_model(error, tmp_path) -> None:
    with pytest.raises(type(error)), errors_in_one_line(tmp_path):
        raise error


def test_verify_needs_checksums_and_compares_them(folder, tmp_path) -> None:
    for options in ({}, {"verify": False}):
        oncelm.load(folder, **options)
    with pytest.raises(ValueError, match=r"cannot be verified: it is no folder with checksums"):
        oncelm.load(folder, verify=True)
    with pytest.raises(ValueError, match=r"no-one/nothing cannot be verified"):
        oncelm.load("no-one/nothing", verify=True)
    write_checksums(folder)
    assert torch.equal(logits(oncelm.load(folder, verify=True)), logits(oncelm.load(folder)))
    edit_config(folder, rope_theta=20_000.0)
    oncelm.load(folder)
    with pytest.raises(ValueError, match=r"config\.json does not match its checksum"):
        oncelm.load(folder, verify=True)


def test_a_folder_that_a_kill_left_aside_is_found(folder) -> None:
    aside = folder.with_name(f".{folder.name}.{0:016x}.tmp")
    for read in (oncelm.load, read_config):
        aside.mkdir()
        folder.rename(aside / "old")
        read(folder)
        assert folder.is_dir()
        assert not aside.exists()


def test_no_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no model folder at runs/book/model\.$"):
        oncelm.load("runs/book/model")
    with pytest.raises(FileNotFoundError, match=r"yoco-3b\. That is a preset"):
        oncelm.load("yoco-3b")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="found: a file"):
        oncelm.load("file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="found: nothing"):
        oncelm.load("empty")


def test_a_hub_id_that_cannot_be_read(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"no-one/nothing \(no such folder, so taken for a Hugging Face hub id"
    ) as refused:
        oncelm.load("no-one/nothing")
    assert "\n" not in str(refused.value)


def test_another_kind_of_model(tmp_path) -> None:
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Unrecognized configuration class") as refused:
        oncelm.load(tmp_path)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat61"}, "unknown dtype 'bfloat61'; did you mean 'bfloat16'"),
        ({"device": "cdua"}, "unknown device 'cdua'; did you mean 'cuda'"),
        ({"device": "cpu", "quantization": "float9"}, "did you mean 'float8'"),
        ({"device": "cpu", "quantization": "float8"}, "need an NVIDIA GPU"),
    ],
)
def test_bad_options(saved, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        oncelm.load(saved, **options)


def test_options_of_execution_are_for_our_models(saved, tmp_path) -> None:
    assert oncelm.load(saved, "cpu", compile=True).compiles_layers
    llama = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, vocab_size=9)
    LlamaForCausalLM(llama).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="compile is an option of YOCO and LongLLaMA models"):
        oncelm.load(tmp_path, "cpu", compile=True)
    assert oncelm.load(tmp_path, "cpu", compile=True, mem_layers=[0]).compiles_layers
    with pytest.raises(ValueError, match="quantization is an option of YOCO models"):
        oncelm.load(tmp_path, "cpu", quantization="float8", mem_layers=[0])


def test_read_config_needs_no_weights(folder) -> None:
    (folder / "model.safetensors").unlink()
    assert read_config(folder).num_self_decoder_layers == 2


def test_build_model() -> None:
    first, again, other = (oncelm.build_model("yoco-tiny", vocab_size=300, seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    with pytest.raises(ValueError, match="unknown preset 'yoco-tyni'; did you mean 'yoco-tiny'"):
        oncelm.build_model("yoco-tyni")
    with pytest.raises(ValueError, match="unknown YocoConfig key 'hiden_size'; did you mean 'hidden_size'"):
        oncelm.build_model("yoco-tiny", hiden_size=3)


def test_names_of_before_are_told(saved) -> None:
    for call in (oncelm.load, oncelm.build):
        with pytest.raises(ValueError, match="argument 'gemm' is now called 'quantization'"):
            call(saved, "cpu", gemm="float8")
    with pytest.raises(ValueError, match="method 'set_gemm' is now called 'set_quantization'"):
        oncelm.load(saved, "cpu").set_gemm("float8")
