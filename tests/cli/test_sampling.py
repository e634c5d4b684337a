"""What of a folder's generation_config.json and config.json counts in `oncelm generate`, and that the rest is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from oncelm import load_tokenizer
from oncelm.cli import main
from tests.models.small import make_long, make_model


def make_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=260, eos_token_id=None, **shape))


MODELS: dict[str, Callable] = {
    "yoco": lambda: make_model("retention", vocab_size=260, eos_token_id=None),
    "longllama": lambda: make_long(vocab_size=260),
    "llama": make_llama,
}


@pytest.fixture(params=MODELS)
def folder(request, tmp_path) -> Path:
    MODELS[request.param]().save_pretrained(tmp_path / "model")
    load_tokenizer("bytes").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def generate(folder, capsys) -> Callable[..., tuple[str, list[str]]]:
    """What is written, and the warnings, with more keys in generation_config.json."""
    file = folder / "generation_config.json"
    before = json.loads(file.read_text())

    def call(*options: str, **settings: object) -> tuple[str, list[str]]:
        file.write_text(json.dumps(before | settings))
        capsys.readouterr()
        arguments = ["--model", str(folder), "--prompt", "The sea is", "--max-new-tokens", "12", "--device", "cpu"]
        assert main(["generate", *arguments, *options]) == 0
        captured = capsys.readouterr()
        return captured.out, [line for line in captured.err.splitlines() if line.startswith("oncelm")]

    return call


def test_ways_to_generate_that_are_left_out(generate) -> None:
    wanted, warnings = generate()
    assert not warnings
    for settings in (
        {"num_beams": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 3, "num_return_sequences": 3},
        {"penalty_alpha": 0.6},
        {"dola_layers": "low"},
        {"guidance_scale": 2.0},
        {"force_words_ids": [[5]]},
        {"min_p": 0.2},
    ):
        text, warnings = generate(**settings)
        assert text == wanted
        assert len(warnings) == 1
        assert warnings[0].startswith("oncelm: warning: left out of the model's generation_config.json: ")
        assert all(f"{name}={value}" in warnings[0] for name, value in settings.items())


def test_what_changes_no_text_is_not_told(generate) -> None:
    wanted = generate()
    for settings in (
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized"},
        {"return_dict_in_generate": True, "output_scores": True, "output_attentions": True},
        {"max_length": 5},
        {"prompt_lookup_num_tokens": 3},
        {"do_sample": True, "temperature": 0.3, "top_k": 4, "top_p": 0.9, "typical_p": 1.0},
        {"prefill_chunk_size": 2},
        {"is_assistant": True, "num_assistant_tokens": 7},
        {"chat_format": "raw"},
    ):
        assert generate(**settings) == wanted


def test_what_ends_a_text_counts(generate) -> None:
    text, _ = generate()
    stop = next(character for character in text if character != "\ufffd")
    stopped, warnings = generate(stop_strings=[stop])
    assert (stopped, warnings) == (text[: text.index(stop) + 1] + "\n", [])
    assert not text.isascii()
    assert generate(suppress_tokens=list(range(4 + 128, 260)))[0].isascii()


def test_a_folder_without_use_cache_writes_the_same(generate, folder) -> None:
    """config.json says it, with and without a generation_config.json."""
    wanted = generate()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    assert generate() == wanted
    assert generate(use_cache=False) == wanted


def test_a_drawn_text_is_the_same_with_beams_in_the_folder(generate) -> None:
    options = ("--temperature", "1.5", "--top-p", "0.9", "--seed", "3")
    text, _ = generate(*options)
    assert generate(*options, num_beams=4, min_p=0.5, typical_p=0.3)[0] == text
