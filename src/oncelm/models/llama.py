"""transformers' Llama by name: the Transformers of the paper's comparison (arXiv 2405.05254, section 4.3)."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from oncelm.models.longllama.config import LongLlamaConfig, check_llama_keys
from oncelm.models.yoco.config import YocoConfig
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


def llama_preset_config(name: str, **overrides: Any) -> LlamaConfig:
    """The configuration of a preset, with any keys changed; with `mem_layers` that of a LongLLaMA of the shape.

    >>> llama_preset_config("llama-160m", mem_layers=[8]).model_type
    'longllama'
    """
    if name not in LLAMA_PRESETS:
        raise unknown("preset", name, LLAMA_PRESETS)
    settings = {**LLAMA_PRESETS[name], **overrides}
    if "mem_layers" in overrides:
        return LongLlamaConfig(**settings)
    known = LlamaConfig().to_dict()
    for key in overrides:
        if key not in known:
            raise unknown("LlamaConfig key", key, known)
    check_llama_keys(overrides)
    return LlamaConfig(**settings)
