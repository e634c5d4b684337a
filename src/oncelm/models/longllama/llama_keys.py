"""What the keys of a LLaMA-family configuration may hold, told before a model is built from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.activations import ACT2FN

from oncelm.utils.errors import check_choice, check_whole

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def check_llama_keys(settings: Mapping[str, Any]) -> None:
    """Raise ValueError naming the first key whose value no LLaMA can have; one that is absent or None has a default.

    >>> check_llama_keys({"hidden_act": "sliu"})
    Traceback (most recent call last):
    ValueError: unknown hidden_act 'sliu'; did you mean 'silu'? Allowed: ...
    """
    check_whole(1, **{name: settings[name] for name in SIZES if settings.get(name) is not None})
    if settings.get("hidden_act") is not None:
        check_choice("hidden_act", settings["hidden_act"], ACT2FN)
