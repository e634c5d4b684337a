"""The paper's sizes have the paper's parameter counts."""

from __future__ import annotations

import pytest
import torch

from oncelm import YocoForCausalLM, describe
from oncelm.models.yoco.presets import PRESETS

# the names in the paper (section 4.3) say the size of the Transformer that each YOCO is compared with
NAMED = {"160m": 160e6, "400m": 400e6, "830m": 830e6, "1.4b": 1.4e9, "2.7b": 2.7e9, "6.8b": 6.8e9, "13b": 13e9}


def count(name: str) -> tuple[int, int]:
    """Parameters in all, and without embeddings and output projection."""
    with torch.device("meta"):
        model = YocoForCausalLM(describe(name))
    total = sum(parameter.numel() for parameter in model.parameters())
    vocabulary = model.config.vocab_size * model.config.hidden_size
    return total, total - vocabulary * (1 if model.config.tie_word_embeddings else 2)


@pytest.mark.parametrize("size", NAMED)
def test_scaling_sizes(size: str) -> None:
    total, _ = count(f"yoco-{size}")
    assert total == pytest.approx(NAMED[size], rel=0.08)


def test_3b_is_the_papers_2_83b_without_embeddings() -> None:
    _, without_embeddings = count("yoco-3b")
    assert round(without_embeddings / 1e9, 2) == 2.83


def test_paper_shapes() -> None:
    config = describe("yoco-13b")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (5120, 40, 40)
    assert config.self_head_dim == 256
    assert config.intermediate_size == 3 * 5120
    assert describe("yoco-3b").self_head_dim == 128


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_with_a_sliding_window(name: str) -> None:
    config = describe(name, self_decoder="sliding_window", window_size=1024)
    assert config.window_size == 1024


def test_unknown_preset() -> None:
    with pytest.raises(ValueError, match="did you mean 'yoco-160m'"):
        describe("yoco-160")
