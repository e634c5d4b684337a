"""OnceLM: language models that cache keys and values once.

`import oncelm` makes the models known to transformers' Auto classes. In the process of the `oncelm` command that waits
until a verb imports `oncelm.models`, so that `--help` need not import torch.
"""

import sys
from typing import TYPE_CHECKING

from oncelm.utils.lazy import lazy_names

if TYPE_CHECKING:
    from oncelm import ops
    from oncelm.data.tokenizers import load_tokenizer
    from oncelm.engine.async_llm import AsyncLLM
    from oncelm.engine.llm import LLM
    from oncelm.engine.params import SamplingParams
    from oncelm.models import (
        LongLlamaConfig,
        LongLlamaForCausalLM,
        YocoConfig,
        YocoForCausalLM,
        build,
        build_model,
        describe,
        load,
    )
    from oncelm.utils.version import __version__

__all__ = [
    "LLM",
    "AsyncLLM",
    "LongLlamaConfig",
    "LongLlamaForCausalLM",
    "SamplingParams",
    "YocoConfig",
    "YocoForCausalLM",
    "__version__",
    "build",
    "build_model",
    "describe",
    "load",
    "load_tokenizer",
    "ops",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "": ("ops",),
        "oncelm.data.tokenizers": ("load_tokenizer",),
        "oncelm.engine.async_llm": ("AsyncLLM",),
        "oncelm.engine.llm": ("LLM",),
        "oncelm.engine.params": ("SamplingParams",),
        "oncelm.models": (
            *("LongLlamaConfig", "LongLlamaForCausalLM", "YocoConfig", "YocoForCausalLM"),
            *("build", "build_model", "describe", "load"),
        ),
        "oncelm.utils.version": ("__version__",),
    },
)


def _is_command() -> bool:
    """Whether this process is `oncelm ...` or `python -m oncelm ...`, and not a program that uses the library."""
    return "oncelm_command" in sys.modules or (
        sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] == __name__  # while Python looks for the module to run
    )


if not _is_command():
    import oncelm.models  # noqa: F401
