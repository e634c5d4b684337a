"""A model by its name: presets, folders of every kind, GGUF files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import oncelm
from oncelm.models import load as load_function
from oncelm.models.load import quiet_transformers
from oncelm.models.resolve import build, build_model, describe, fresh
from oncelm.models.yoco.official import write_official
from oncelm.utils import settings
from tests.models.small import make_long, make_model
from tests.models.test_longllama import make_llama


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A folder of each kind, by name."""
    root = tmp_path_factory.mktemp("models")
    yoco = make_model("retention", num_key_value_heads=None, rope_pairing="interleaved")
    with quiet_transformers():
        for name, model in (("yoco", yoco), ("long", make_long()), ("llama", make_llama())):
            model.save_pretrained(root / name)
    return root


@pytest.mark.parametrize(
    ("name", "overrides", "kind"),
    [
        ("yoco", {"max_position_embeddings": 32, "rope_theta": 7.0}, "oncelm_yoco"),
        ("long", {"max_position_embeddings": 32, "rms_norm_eps": 0.5}, "longllama"),
        ("llama", {"max_position_embeddings": 32, "mem_layers": [1]}, "longllama"),
    ],
)
def test_a_folder_with_other_keys(name, overrides, kind, folders) -> None:
    """The same for every family, in the configuration and in the model, whose weights stay."""
    config = describe(folders / name, **overrides)
    model = oncelm.load(folders / name, "cpu", **overrides)
    for found in (config, model.config, build(folders / name, weights=False, **overrides).config):
        assert found.model_type == kind
        assert {key: getattr(found, key) for key in overrides} == overrides
    plain = build(folders / name, "cpu")
    assert plain.config.max_position_embeddings != 32
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))


def test_an_official_folder_with_other_keys(tmp_path) -> None:
    write_official(oncelm.build_model("yoco-tiny", vocab_size=60, intermediate_size=64), tmp_path / "official")
    assert describe(tmp_path / "official", window_size=8).window_size == 8
    assert oncelm.load(tmp_path / "official", "cpu", rope_theta=9.0).config.rope_theta == 9.0


def test_keys_that_change_sizes_do_not_fit_the_weights(folders) -> None:
    with pytest.raises(ValueError, match=r"Read with \{'hidden_size': 128\}, which its weights have to fit"):
        oncelm.load(folders / "yoco", "cpu", hidden_size=128)
    with pytest.raises(ValueError, match="unknown YocoConfig key 'rope_teta'; did you mean 'rope_theta'"):
        describe(folders / "yoco", rope_teta=1.0)


def test_presets() -> None:
    for name, kind in (("yoco-tiny", "oncelm_yoco"), ("llama-tiny", "llama")):
        config = describe(name, vocab_size=60)
        assert (config.model_type, config.vocab_size, config.hidden_size) == (kind, 60, 128)
        model = build(name, "cpu", "bfloat16", seed=3, vocab_size=60)
        assert (model.dtype, model.training) == (torch.bfloat16, False)
        assert build(name, weights=False, vocab_size=60).device.type == "meta"
        assert build_model(name, vocab_size=60).dtype == torch.float32
    assert describe("llama-tiny", mem_layers=[1]).mem_layers == [1]
    assert build("yoco-tiny", "cpu", compile=True, vocab_size=60).compiles_layers
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        describe("yoco-tiny", hiden_size=8)
    with pytest.raises(ValueError, match="quantization is an option of YOCO models; llama-tiny is a LlamaForCausalLM"):
        build("llama-tiny", "cpu", quantization="float8", vocab_size=60)


def test_names_that_are_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (describe, build):
        with pytest.raises(ValueError, match="unknown model 'yoco-3bb'; did you mean 'yoco-3b'"):
            call("yoco-3bb")
        with pytest.raises(FileNotFoundError, match="no model folder at runs/x/model"):
            call("runs/x/model")


def test_a_folder_comes_before_a_preset_of_its_name(folders, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    Path("yoco-tiny").symlink_to(folders / "long")
    assert describe("yoco-tiny").model_type == "longllama"


def test_a_configuration_is_read_once(folders, monkeypatch) -> None:
    read: list[Path] = []
    monkeypatch.setattr(settings.Path, "read_text", lambda file, **_: read.append(file) or file.read_bytes().decode())
    config = describe(folders / "yoco")
    model = load_function(folders / "yoco", "cpu", config=config)
    assert [file.name for file in read].count("config.json") == 1
    assert model.config.to_dict() == oncelm.load(folders / "yoco", "cpu").config.to_dict()


def test_the_callers_random_numbers_stay() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    one, again, other = (fresh(describe("yoco-tiny", vocab_size=60), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()
