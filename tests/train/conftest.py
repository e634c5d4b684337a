"""A model, data and settings so small that a step takes milliseconds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from oncelm.data.dataset import TokenDataset
from oncelm.train.config import TrainConfig


@pytest.fixture
def make_model():
    def make(hidden_size: int = 16, **options) -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=hidden_size,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            attention_dropout=0.1,  # so that the random state matters
            **options,
        )
        return LlamaForCausalLM(config)

    return make


@pytest.fixture
def dataset() -> TokenDataset:
    tokens = np.arange(1000, dtype=np.uint32) ** 2 % 31
    return TokenDataset(tokens, seq_len=16, seed=1)


@pytest.fixture
def make_config(tmp_path):
    def make(**options) -> TrainConfig:
        defaults = {
            **{"data": "unused", "out": str(tmp_path / "run"), "seq_len": 16, "batch_size": 2, "steps": 6},
            **{"warmup_steps": 2, "lr": 1e-2, "log_every": 1, "save_every": 2, "eval_every": 3},
        }
        return TrainConfig(**(defaults | options))

    return make
