"""Tiny targets of both kinds."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from oncelm.bench import Ceilings, OwnTarget, PeerTarget, llama_config, runner
from oncelm.models import YocoConfig, YocoForCausalLM
from oncelm.models.yoco.presets import sized_config
from tests.models.small import make_long


def tiny_config(**changes) -> YocoConfig:
    return sized_config(64, 4, **{"vocab_size": 97, "num_attention_heads": 4, "num_key_value_heads": 2, **changes})


def tiny_yoco(**changes) -> OwnTarget:
    torch.manual_seed(0)
    return OwnTarget(YocoForCausalLM(tiny_config(**changes)).eval())


def tiny_llama(**changes) -> PeerTarget:
    torch.manual_seed(0)
    return PeerTarget(LlamaForCausalLM(llama_config(tiny_config(**changes))).eval())


def tiny_long(**changes) -> OwnTarget:
    return OwnTarget(make_long(**{"max_position_embeddings": 96, "last_context_length": 32, **changes}))


@pytest.fixture
def quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine's ceilings takes seconds that tests do not need."""
    monkeypatch.setattr(runner, "measure_ceilings", lambda device, dtype: Ceilings(1e11, 1e10))
