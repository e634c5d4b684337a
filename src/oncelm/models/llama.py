"""transformers' Llama by name: the Transformers of the paper's comparison (arXiv 2405.05254, section 4.3)."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from oncelm.models.longllama.config import LongLlamaConfig, check_llama_keys
from oncelm.models.yoco.presets import PRESETS, llama_twin, preset_config
from oncelm.utils.errors import unknown

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
