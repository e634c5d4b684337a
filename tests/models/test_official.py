"""Official YOCO folders: the recorded logits, conversion both ways, and every bad folder refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import oncelm
from oncelm.models.yoco.mixers import Mixer
from oncelm.models.yoco.mixers.registry import MIXERS
from oncelm.models.yoco.official import (
    _KEYS,
    PARAMS,
    WEIGHTS,
    fixed_keys,
    is_official_folder,
    read_official,
    read_params,
    write_official,
)
from tests.full_disk import no_space, small_files
from tests.models.small import make_model
from tests.models.test_load import Harmful

close = {"rtol": 0, "atol": 1e-4}


def official_model(**changes: Any) -> oncelm.YocoForCausalLM:
    return make_model("retention", num_self_key_value_heads=None, **changes)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None], use_cache=False).logits


# -- the official code's outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gret", "swa"])
@pytest.mark.parametrize("by_way_of", ["official", "hugging face", "official again"])
def test_recorded_logits(name, by_way_of, golden, tmp_path) -> None:
    model = oncelm.load(golden / "yoco" / name, device="cpu")
    if by_way_of == "hugging face":
        model.save_pretrained(tmp_path)
        model = oncelm.load(tmp_path, device="cpu")
    elif by_way_of == "official again":
        write_official(model, tmp_path)
        model = oncelm.load(tmp_path, device="cpu")
    expected = load_file(golden / "yoco" / name / "expected.safetensors")
    ids, decoded = expected["input_ids"], expected["decode_logits"]
    steps = decoded.shape[1]
    length = ids.shape[1] - steps + 1
    with torch.no_grad():
        full = model(ids[:, :length], use_cache=False, logits_to_keep=expected["positions"]).logits
    torch.testing.assert_close(full, expected["logits"], **close)

    cache = model.new_cache(ids.shape[0], ids.shape[1])
    model.prefill(ids[:, : length - 1], cache, chunk_size=100)
    for step in range(steps):
        place = length - 1 + step
        with torch.no_grad():
            logits = model(ids[:, place : place + 1], past_key_values=cache).logits
        torch.testing.assert_close(logits[:, 0], decoded[:, step], **close)


# -- both ways --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [{}, {"self_decoder": "sliding_window", "window_size": 7}, {"tie_word_embeddings": True}, {"rope_theta": 5e5}],
    ids=["retention", "window", "tied", "theta"],
)
def test_to_official_and_back(changes, tmp_path) -> None:
    model = official_model(**changes)
    write_official(model, tmp_path / "official")
    assert is_official_folder(tmp_path / "official")
    assert sorted(os.listdir(tmp_path / "official")) == sorted(["SHA256SUMS", WEIGHTS, PARAMS])
    back = read_official(tmp_path / "official")
    assert torch.equal(logits(back), logits(model))
    own, again = model.config.to_dict(), back.config.to_dict()
    assert [own[key] for key in model.config.stated_keys()] == [again[key] for key in back.config.stated_keys()]


def test_dtype(tmp_path) -> None:
    model = official_model()
    write_official(model.to(torch.bfloat16), tmp_path)
    assert read_official(tmp_path).dtype == torch.bfloat16
    assert oncelm.load(tmp_path, dtype="float32").dtype == torch.float32


def test_weights_in_a_dict_of_the_training_code(tmp_path) -> None:
    model = official_model()
    write_official(model, tmp_path)
    torch.save({"model": torch.load(tmp_path / WEIGHTS)}, tmp_path / WEIGHTS)
    assert torch.equal(logits(read_official(tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": "interleaved"}, "has only layout='stacked'; this model has 'interleaved'"),
        ({"rope_pairing": "half"}, "has only rope_pairing='interleaved'"),
        ({"num_self_decoder_layers": 3}, "has only num_self_decoder_layers=2; this model has 3"),
        (
            {"self_decoder": "sliding_window", "num_self_key_value_heads": 1},
            "has only num_self_key_value_heads=2; this model has 1",
        ),
    ],
)
def test_what_the_official_code_has_not(changes, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        write_official(make_model("retention", **changes), tmp_path / "official")
    assert not any(tmp_path.iterdir())


def test_another_kind_of_self_decoder_is_not_written_as_retention(tmp_path, monkeypatch) -> None:
    model = make_model("retention")
    vars(model.config)["self_decoder"] = "third"
    monkeypatch.setitem(MIXERS, "third", type("Third", (Mixer,), {}))
    with pytest.raises(ValueError, match="the official format knows gated_retention and sliding_window, and not Third"):
        write_official(model, tmp_path / "official")
    assert not any(tmp_path.iterdir())


def test_every_key_is_written_or_has_one_value_or_comes_back_otherwise() -> None:
    """A key added to YocoConfig must not be lost in the official format without a word."""
    elsewhere = {
        "num_cross_decoder_layers",
        "self_decoder",
        "layer_types",
        "conv_size",
        "window_size",
        "tie_word_embeddings",
    }
    of_a_run = {"max_position_embeddings", "use_cache", "bos_token_id", "pad_token_id", "eos_token_id"}
    written = {*_KEYS.values(), *fixed_keys(oncelm.YocoConfig())}
    assert set(oncelm.YocoConfig.own_keys()) == written | elsewhere | of_a_run


# -- bad folders ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "official"
    write_official(official_model(), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "official"))


def edit_params(folder: Path, *without: str, **changes: Any) -> None:
    params = json.loads((folder / PARAMS).read_text()) | changes
    (folder / PARAMS).write_text(json.dumps({key: value for key, value in params.items() if key not in without}))


def edit_weights(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    state = torch.load(folder / WEIGHTS)
    change(state)
    torch.save(state, folder / WEIGHTS)


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no params": (
        lambda f: (f / PARAMS).unlink(),
        "is no model folder: it needs config.json .* found: SHA256SUMS, checkpoint.pth",
    ),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "is no model folder: .* found: SHA256SUMS, params.json"),
    "params not JSON": (lambda f: (f / PARAMS).write_text('{"dim": '), "params.json is not JSON: Expecting value"),
    "params not text": (lambda f: (f / PARAMS).write_bytes(b"\xff"), "params.json is not JSON"),
    "params a list": (lambda f: (f / PARAMS).write_text("[]"), "params.json must hold a JSON object, got list"),
    "unknown key": (lambda f: edit_params(f, n_layer=4), "'n_layer'; did you mean 'n_layers'?"),
    "missing keys": (lambda f: edit_params(f, "dim", "n_attn_heads"), "params.json lacks dim, n_attn_heads"),
    "text for a number": (lambda f: edit_params(f, dim="32"), "params.json: dim must be an integer, got '32'"),
    "null": (lambda f: edit_params(f, n_layers=None), "n_layers must be an integer, got None"),
    "true for a number": (lambda f: edit_params(f, norm_eps=True), "norm_eps must be a number, got True"),
    "odd layers": (lambda f: edit_params(f, n_layers=3), "n_layers must be even .* got 3"),
    "no layers": (lambda f: edit_params(f, n_layers=0), "params.json: a model needs a layer"),
    "heads do not divide": (lambda f: edit_params(f, n_attn_heads=3), "params.json: hidden_size 32 does not split"),
    "empty file": (lambda f: os.truncate(f / WEIGHTS, 0), "checkpoint.pth is no PyTorch checkpoint"),
    "text file": (lambda f: (f / WEIGHTS).write_text("hello"), "checkpoint.pth is no PyTorch checkpoint"),
    "truncated": (lambda f: os.truncate(f / WEIGHTS, 90_000), "checkpoint.pth is damaged: "),
    "truncated to its start": (lambda f: os.truncate(f / WEIGHTS, 40), "checkpoint.pth is damaged: "),
    "no dict": (lambda f: torch.save(torch.ones(3), f / WEIGHTS), "must hold a dict of tensors by name"),
    "no tensor": (lambda f: edit_weights(f, lambda state: state.update(step=3)), "must hold a dict of tensors by name"),
    "missing tensor": (
        lambda f: edit_weights(f, lambda state: state.pop("layer_norm.weight")),
        "checkpoint.pth lacks tensors: layer_norm.weight",
    ),
    "unexpected tensor": (
        lambda f: edit_weights(f, lambda state: state.update(extra=torch.ones(2))),
        "checkpoint.pth has unknown tensors: extra",
    ),
    "wrong size": (
        lambda f: edit_weights(f, lambda state: state.update({"layer_norm.weight": torch.ones(5)})),
        r"layer_norm.weight is \[5\], params.json asks for \[32\]",
    ),
    "integers": (
        lambda f: edit_weights(f, lambda state: state.update({"layer_norm.weight": torch.ones(32).int()})),
        "layer_norm.weight must hold floating point numbers, got torch.int32",
    ),
    "another depth": (lambda f: edit_params(f, n_layers=6), "lacks tensors: cross_decoder.layers.2"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_folder_is_refused_in_one_line(case, folder) -> None:
    damage, message = BAD[case]
    damage(folder)
    with pytest.raises(ValueError, match=message) as refused:
        oncelm.load(folder)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_cannot_run_code(zipped, folder, tmp_path) -> None:
    state = {"layer_norm.weight": Harmful(tmp_path / "harm")}
    if zipped:
        torch.save(state, folder / WEIGHTS)
    else:
        (folder / WEIGHTS).write_bytes(pickle.dumps(state))
    with pytest.raises(ValueError, match="could run code, so it is refused" if zipped else "is no PyTorch checkpoint"):
        oncelm.load(folder)
    assert not (tmp_path / "harm").exists()


def test_read_params_needs_no_weights(folder) -> None:
    (folder / WEIGHTS).write_bytes(b"")
    assert read_params(folder).num_cross_decoder_layers == 2


# -- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [no_space, small_files])
def test_a_full_disk_leaves_the_old_folder(failure, folder, tmp_path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model = official_model(rope_theta=3.0)
    with failure(), pytest.raises(OSError, match=r"cannot write .*official"):
        write_official(model, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["official"]
