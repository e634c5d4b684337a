"""Damaged config.json and generation_config.json, of both families and of plain models of transformers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import oncelm
from oncelm import LongLlamaConfig, YocoConfig
from oncelm.cli.info import describe
from oncelm.models.load import quiet_transformers
from oncelm.models.own_config import COMMON, TRANSFORMERS_KEYS
from tests.fuzz.guard import JUNK, NUMBERS, damaged_dict, damaged_text, draws, guarded
from tests.models.small import make_long, make_model

pytestmark = pytest.mark.slow
SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS = {
    "yoco": lambda: make_model("retention"),
    "window": lambda: make_model("window"),
    "longllama": make_long,
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, n_positions=32)),
}
CONFIGS = {"yoco": YocoConfig, "window": YocoConfig, "longllama": LongLlamaConfig}
OTHERS = [*COMMON, *sorted(TRANSFORMERS_KEYS), "rope_scaling", "note", "rope_type", "sliding_window", "head_dim"]


@cache
def folder_of(family: str) -> Path:
    folder = Path(mkdtemp(prefix="fuzz-"))
    with quiet_transformers():
        MODELS[family]().save_pretrained(folder)
    return folder


@cache
def original(family: str, name: str) -> str:
    return (folder_of(family) / name).read_text()


def use(folder: Path) -> None:
    """Describe the model, and if it loads, write a few tokens with it."""
    with guarded():
        describe(str(folder))
    with guarded():
        model = oncelm.load(folder, "cpu")
        ids = torch.tensor([[5, 6, 7]])
        assert model(ids, use_cache=False, return_dict=True).logits.shape[-1] == model.config.vocab_size
        with quiet_transformers():
            model.generate(ids, max_new_tokens=3, num_beams=1, streamer=None, use_cache=True)


@pytest.mark.parametrize("family", MODELS)
@draws(140)
@given(data=st.data())
def test_config_json(family, data) -> None:
    folder = folder_of(family)
    settings = json.loads(original(family, "config.json"))
    keys = [*CONFIGS[family].constraints, *OTHERS] if family in CONFIGS else OTHERS
    try:
        (folder / "config.json").write_text(json.dumps(data.draw(damaged_dict(settings, keys))))
        use(folder)
    finally:
        (folder / "config.json").write_text(original(family, "config.json"))


@pytest.mark.parametrize("family", ["yoco", "longllama", "llama"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@draws(60)
@given(data=st.data())
def test_text_that_is_damaged(family, name, data) -> None:
    folder, text = folder_of(family), original(family, name)
    try:
        (folder / name).write_bytes(data.draw(damaged_text(text)))
        use(folder)
    finally:
        (folder / name).write_text(text)


@pytest.mark.parametrize("family", ["yoco", "longllama", "llama"])
@draws(150)
@given(data=st.data())
def test_generation_config_json(family, data) -> None:
    folder, text = folder_of(family), original(family, "generation_config.json")
    keys = [key for key in vars(GenerationConfig()) if not key.startswith("_")]
    # what makes a text of endless length, or needs a second model, is a wish and no damage
    keys = [key for key in keys if key not in ("max_length", "min_length", "min_new_tokens", "max_time")]
    try:
        settings = data.draw(damaged_dict(json.loads(text), keys))
        (folder / "generation_config.json").write_text(json.dumps(settings))
        use(folder)
    finally:
        (folder / "generation_config.json").write_text(text)


@pytest.mark.parametrize("family", CONFIGS)
@draws(300)
@given(data=st.data())
def test_configurations_in_python(family, data) -> None:
    config = CONFIGS[family]
    keys = data.draw(
        st.dictionaries(st.sampled_from([*config.own_keys(), *OTHERS]), st.sampled_from(NUMBERS) | JUNK, max_size=3)
    )
    values: Any = None
    with guarded():
        values = config(**keys).to_dict()
    if values is not None:
        assert config.from_dict(values).to_dict() == values
