"""OnceLM: language models that cache keys and values once."""

from oncelm import ops
from oncelm.data.tokenizers import load_tokenizer
from oncelm.models import (
    LongLlamaConfig,
    LongLlamaForCausalLM,
    YocoConfig,
    YocoForCausalLM,
    build_model,
    load,
)

__all__ = [
    "LongLlamaConfig",
    "LongLlamaForCausalLM",
    "YocoConfig",
    "YocoForCausalLM",
    "build_model",
    "load",
    "load_tokenizer",
    "ops",
]
