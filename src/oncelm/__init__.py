"""OnceLM: language models that cache keys and values once."""

from importlib.metadata import PackageNotFoundError, version

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

try:
    __version__ = version("oncelm")
except PackageNotFoundError:  # a source tree on the path that nobody installed
    __version__ = "unknown"

__all__ = [
    "LongLlamaConfig",
    "LongLlamaForCausalLM",
    "YocoConfig",
    "YocoForCausalLM",
    "__version__",
    "build_model",
    "load",
    "load_tokenizer",
    "ops",
]
