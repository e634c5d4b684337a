"""Small models behind the reader, of every kind of cache, with the byte tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from oncelm import load_tokenizer
from oncelm.eval import LanguageModel
from tests.models.small import make_model

KINDS = ("retention", "window", "interleaved", "llama", "mistral")
SHAPE = {
    "vocab_size": 260, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "eos_token_id": None, "bos_token_id": None, "max_position_embeddings": 4096,
    "initializer_range": 0.3,
}  # fmt: skip


def build(kind: str) -> LanguageModel:
    torch.manual_seed(0)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    elif kind == "mistral":  # a sliding window: its cache cannot be cropped
        model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=9))
    else:
        model = make_model(kind, vocab_size=260, eos_token_id=None, max_position_embeddings=4096)
    return LanguageModel(model, load_tokenizer("bytes"), kind)


@pytest.fixture(scope="session")
def language_models() -> Callable[[str], LanguageModel]:
    """The model of a kind, made once."""
    made: dict[str, LanguageModel] = {}

    def get(kind: str) -> LanguageModel:
        if kind not in made:
            made[kind] = build(kind)
        return made[kind]

    return get


@pytest.fixture
def haystack(tmp_path) -> str:
    """A file of numbered sentences, none like another."""
    return write_haystack(tmp_path)


def write_haystack(folder: Path) -> str:
    file = folder / "haystack.txt"
    file.write_text("".join(f"Sentence {i} says {i * i % 97} things. " for i in range(400)))
    return str(file)
