"""transformers' Llama by name: the Transformers of the paper's comparison (arXiv 2405.05254, section 4.3)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from oncelm.models.longllama import LongLlamaConfig, LongLlamaForCausalLM
from oncelm.models.longllama.config import check_llama_keys
from oncelm.models.size import check_fits
from oncelm.models.yoco import YocoConfig
from oncelm.models.yoco.presets import PRESETS, preset_config
from oncelm.utils.errors import unknown


def llama_twin(config: YocoConfig) -> dict[str, Any]:
    """Keys of the Llama that a YOCO is compared with, in training as in benchmarks.

    Same width, depth, vocabulary, heads and, in every layer, key/value heads as the shared cache. Its feed-forward is
    8/3 d wide, rounded up to a multiple of 128: the YOCO paper pairs that with 3 d for its own model, which spends less
    on key and value projections. So the Llama has a few percent fewer parameters, never more.
    """
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": -(-8 * config.hidden_size // (3 * 128)) * 128,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.shared_kv_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
    }


LLAMA_PRESETS = {name.replace("yoco", "llama"): llama_twin(preset_config(name)) for name in PRESETS}


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
