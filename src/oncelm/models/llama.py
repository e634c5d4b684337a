"""transformers' Llama by name: the Transformers of the paper's comparison (arXiv 2405.05254, section 4.3)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from oncelm.models.longllama import LongLlamaConfig, LongLlamaForCausalLM
from oncelm.models.longllama.config import check_llama_keys
from oncelm.models.size import check_fits
from oncelm.models.yoco.presets import PRESETS
from oncelm.utils.errors import unknown


def _twin(preset: dict[str, Any]) -> dict[str, Any]:
    """The Transformer beside a YOCO: width, layers and heads the same, feed-forward 8/3 d to a multiple of 128."""
    d, heads = preset["hidden_size"], preset["num_attention_heads"]
    return {
        "vocab_size": preset.get("vocab_size", 100288),
        "hidden_size": d,
        "intermediate_size": 128 * round(8 / 3 * d / 128),
        "num_hidden_layers": preset["num_self_decoder_layers"] + preset["num_cross_decoder_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": preset.get("num_key_value_heads", heads),
        "max_position_embeddings": preset["max_position_embeddings"],
        "tie_word_embeddings": preset.get("tie_word_embeddings", False),
    }


LLAMA_PRESETS = {name.replace("yoco", "llama"): _twin(preset) for name, preset in PRESETS.items()}


def build_llama(name: str, *, seed: int = 0, **overrides: Any) -> LlamaForCausalLM | LongLlamaForCausalLM:
    """A Llama of a preset with fresh weights drawn from `seed`, in float32, on the CPU or the default device.

    With `mem_layers` it is a LongLLaMA of that shape, and overrides are keys of LongLlamaConfig.
    """
    if name not in LLAMA_PRESETS:
        raise unknown("preset", name, LLAMA_PRESETS)
    settings = {**LLAMA_PRESETS[name], **overrides}
    if "mem_layers" in overrides:
        config: LlamaConfig = LongLlamaConfig(**settings)
        model_class: type[LlamaForCausalLM | LongLlamaForCausalLM] = LongLlamaForCausalLM
    else:
        known = LlamaConfig().to_dict()
        for key in overrides:
            if key not in known:
                raise unknown("LlamaConfig key", key, known)
        check_llama_keys(overrides)
        config, model_class = LlamaConfig(**settings), LlamaForCausalLM
    check_fits(config, None, torch.get_default_device())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config)
