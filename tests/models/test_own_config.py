"""Both families' configurations: every key has a constraint, at every time; keys of other tools are kept."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import oncelm
from oncelm import LongLlamaConfig, YocoConfig
from oncelm.models.load import quiet_transformers, read_config
from oncelm.utils.constraints import Constraint
from tests.models.small import make_long, make_model

FAMILIES = {"yoco": lambda: make_model("retention"), "longllama": make_long}
CONFIGS = {"yoco": YocoConfig, "longllama": LongLlamaConfig}
# what other programs are known to leave in a config.json
OTHERS: dict[str, Any] = {
    "note": "fine-tuned",
    "_attn_implementation_autoset": True,
    "unsloth_version": "2025.1.1",
    "tokenizer_class": "PreTrainedTokenizerFast",
    "sep_token_id": None,
    "unk_token_id": 3,
    "pad_token": "</s>",
    "torchscript": False,
    "task_specific_params": {"a": [1, {"b": None}]},
    "pruned_heads": {},
    "layer_count": 4,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_has_a_constraint_that_its_default_fits(family) -> None:
    config = CONFIGS[family]()
    for key in config.own_keys():
        assert isinstance(config.constraints[key], Constraint), key
        assert config.constraints[key](key, getattr(config, key)) == getattr(config, key)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "wrong",
    [math.nan, math.inf, -7, 1.5, "x", "", [], [[]], {"a": 1}, 10**30, True, 7, b"1", object()],
    ids=lambda wrong: str(wrong)[:12],
)
def test_a_wrong_value_of_any_key_is_refused_or_means_something(family, wrong) -> None:
    for key in CONFIGS[family].own_keys():
        with contextlib.suppress(ValueError):
            config = CONFIGS[family](**{key: wrong})
            json.dumps(config.to_dict(), default=str, allow_nan=False)
            kind = type(getattr(CONFIGS[family](), key))
            assert not isinstance(wrong, bool) or kind is bool, key
            assert wrong != 1.5 or kind is float or key == "gate_logit_normalizer", key


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": -1}, "max_position_embeddings must be a whole number of at least 1, got -1"),
        ({"tie_word_embeddings": 7}, "tie_word_embeddings must be true or false, got 7"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps must be a number above 0 and at most 1, got nan"),
        ({"hidden_size": 10**9}, "hidden_size must be at most 16777216, got 1000000000"),
        ({"vocab_size": 10**13}, "vocab_size must be at most 2147483647"),
        ({"dtype": "float8"}, "unknown dtype 'float8'; did you mean 'float64'"),
        ({"dtype": "nn"}, "unknown dtype 'nn'"),
        ({"dtype": torch.int8}, "unknown dtype 'int8'"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a whole number of at least"),
        ({"eos_token_id": ["</s>"]}, r"eos_token_id\[0\] must be a whole number"),
        ({"output_hidden_states": 2}, "output_hidden_states must be true or false"),
        ({"problem_type": "classification"}, "unknown problem_type 'classification'"),
        ({"output_attentions": True}, "output_attentions is not offered"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder is not offered"),
        ({"chunk_size_feed_forward": 8}, "chunk_size_feed_forward is not offered"),
        ({"per_layer_config": {"0": {"hidden_size": 8}}}, "per_layer_config is not offered"),
        ({"return_dict": 1}, "return_dict must be true or false"),
        ({"id2label": 5}, "id2label must be a dictionary"),
        ({"quantization_config": 5}, "quantization_config must be a dictionary"),
    ],
)
def test_a_wrong_value_is_named(family, changes, message, tmp_path) -> None:
    config = CONFIGS[family]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": config.model_type, **changes}, default=str))
    for make in (
        lambda: config(**changes),
        lambda: config.from_dict(changes),
        lambda: config.from_pretrained(tmp_path),
        lambda: setattr(config(), *next(iter(changes.items()))),
        lambda: read_config(tmp_path),
    ):
        with pytest.raises(ValueError, match=message if "torch" not in str(changes) else "dtype"):
            make()


def test_keys_of_yoco_alone() -> None:
    for changes, message in (
        ({"window_size": 1.5}, "window_size must be a whole number of at least 1, got 1.5"),
        ({"gate_logit_normalizer": 0}, "gate_logit_normalizer must be a number above 0, got 0"),
        ({"num_self_decoder_layers": 10**6}, "num_self_decoder_layers must be at most 4096"),
        ({"rope_theta": math.inf}, "rope_theta must be a number above 0, got inf"),
    ):
        with pytest.raises(ValueError, match=message):
            YocoConfig(**changes)


@pytest.mark.parametrize(
    "rope",
    [{"type": "linear"}, {"rope_type": ["a"]}, {"rope_type": "foo"}, {"rope_theta": "a"}, {"factor": math.nan}, 3, "x"],
)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_rotation_that_cannot_be(key, rope) -> None:
    with pytest.raises(ValueError, match=r"rope|factor"):
        LongLlamaConfig(**{key: rope})


# -- keys of other tools ----------------------------------------------------------------------------------------------


@pytest.fixture(params=FAMILIES)
def folder(request, tmp_path) -> Path:
    with quiet_transformers():
        FAMILIES[request.param]().save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_keys_of_other_tools_are_kept_with_one_warning(folder, tmp_path, caplog) -> None:
    edit(folder, **OTHERS)
    with caplog.at_level(logging.WARNING, "oncelm"):
        model = oncelm.load(folder, "cpu")
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder}: keys that OnceLM does not use, kept as they are: {', '.join(OTHERS)}"
    ]
    again = tmp_path / "again"
    with quiet_transformers():
        model.save_pretrained(again)
        assert type(AutoModelForCausalLM.from_pretrained(again)) is type(model)
    saved = json.loads((again / "config.json").read_text())
    assert {key: saved[key] for key in OTHERS} == OTHERS
    assert oncelm.load(again, "cpu").fingerprint() == model.fingerprint()


def test_a_key_set_in_python_is_saved_and_loaded(folder, tmp_path) -> None:
    model = oncelm.load(folder, "cpu")
    model.config.note = "x"
    with quiet_transformers():
        model.save_pretrained(tmp_path / "again")
    assert oncelm.load(tmp_path / "again", "cpu").config.note == "x"


def test_every_misspelt_key_of_a_file_is_refused(folder) -> None:
    config = read_config(folder)
    for key in config.own_keys():
        middle = len(key) // 2
        for wrong in (key[:middle] + key[middle + 1 :], key[:middle] + "q" + key[middle:], key[:-1] + "q"):
            with pytest.raises(ValueError, match=f"unknown {type(config).__name__} key '{wrong}'; did you mean '"):
                type(config).from_dict({wrong: 3})


def test_a_key_that_the_class_uses_itself_is_refused(folder) -> None:
    for key in ("to_dict", "save_pretrained", "__class__", "attribute_map"):
        edit(folder, **{key: "x"})
        with pytest.raises(ValueError, match=f"cannot have a key '{key}' of 'x'"):
            oncelm.load(folder)
        edit(folder, **{key: None})
    oncelm.load(folder)


def test_a_derived_key_must_be_right(tmp_path) -> None:
    with quiet_transformers():
        make_model("retention").save_pretrained(tmp_path)
    edit(tmp_path, num_hidden_layers=4, head_dim=8)
    oncelm.load(tmp_path)
    edit(tmp_path, num_hidden_layers=5)
    with pytest.raises(ValueError, match="cannot have a key 'num_hidden_layers' of 5: the other keys say 4"):
        oncelm.load(tmp_path)


def test_in_python_every_unknown_key_is_an_error() -> None:
    for make in (YocoConfig, LongLlamaConfig, lambda **keys: oncelm.build_model("yoco-tiny", **keys)):
        with pytest.raises(ValueError, match="key 'foo'"):
            make(foo=1)


def test_keys_given_beside_a_file_are_checked(folder) -> None:
    for options in ({"rms_norm_eps": math.nan}, {"rms_norm_ep": 1e-6}):
        with pytest.raises(ValueError, match="rms_norm_eps"):
            AutoConfig.from_pretrained(folder, **options)
    assert AutoConfig.from_pretrained(folder, rms_norm_eps=1e-4).rms_norm_eps == 1e-4


def test_a_plain_llama_with_a_wrong_value(tmp_path) -> None:
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 16)
    config = LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    with quiet_transformers():
        LlamaForCausalLM(config).save_pretrained(tmp_path)
    for key, wrong in (("rms_norm_eps", math.nan), ("vocab_size", 10**13), ("dtype", "float8"), ("hidden_size", 10**9)):
        before = json.loads((tmp_path / "config.json").read_text())[key]
        edit(tmp_path, **{key: wrong})
        for overrides in ({}, {"mem_layers": [0]}):
            with pytest.raises(ValueError, match=key):
                oncelm.load(tmp_path, **overrides)
        edit(tmp_path, **{key: before})
