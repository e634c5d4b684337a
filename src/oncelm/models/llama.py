"""Ranges of the configuration keys of transformers' Llama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.activations import ACT2FN

from oncelm.utils.constraints import POSITIVE, Constraint, Each, Flag, Keyed, Number, OneOf, Text, Whole, check_all

HEADS = Whole(1, 2**16, optional=True)
TOKEN = Whole(-1, optional=True)  # -1 in the first LLaMA's folders: none
# Keys of `rope_parameters`: numbers, one or one a frequency.
ROPE = {
    **dict.fromkeys(("rope_theta", "factor", "original_max_position_embeddings"), POSITIVE),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), POSITIVE),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), Number(optional=True)),
    "partial_rotary_factor": Number(0, 1, open_low=True, optional=True),
    "truncate": Flag(optional=True),
}
# LLaMA's own keys; an absent one has a default.
LLAMA: dict[str, Constraint] = {
    "vocab_size": Whole(1, 2**31 - 1),
    **dict.fromkeys(("hidden_size", "intermediate_size"), Whole(1, 2**24)),
    "num_hidden_layers": Whole(1, 4096),
    "num_attention_heads": Whole(1, 2**16),
    **dict.fromkeys(("num_key_value_heads", "head_dim"), HEADS),
    "hidden_act": OneOf(tuple(ACT2FN)),
    "max_position_embeddings": Whole(1),
    "initializer_range": Number(0, 1),
    "rms_norm_eps": Number(0, 1, open_low=True),
    **dict.fromkeys(("use_cache", "tie_word_embeddings", "attention_bias", "mlp_bias"), Flag()),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), TOKEN),
    "eos_token_id": Each(Whole(-1), or_one=True, optional=True),
    "pretraining_tp": Whole(1, optional=True),
    "rope_parameters": Keyed(ROPE, optional=True),
    "attention_dropout": Number(0, 1, optional=True),
}
# Keys of LLaMA's older configurations and of the official LongLLaMA folders that mean nothing here, or are translated.
TRANSLATED: dict[str, Constraint] = {
    "rope_theta": Number(0, open_low=True, optional=True),
    "rope_scaling": Keyed(ROPE, optional=True),
    "partial_rotary_factor": ROPE["partial_rotary_factor"],
}
# Keys that make transformers' caches other ones, in a plain LLaMA too.
OF_CACHES: dict[str, Constraint] = {
    **dict.fromkeys(("sliding_window", "attention_chunk_size"), Whole(1, optional=True)),
    "layer_types": Each(Text()),
}


def check_llama_keys(settings: Mapping[str, Any]) -> None:
    """Raise ValueError naming the first key whose value no LLaMA can have; one that is absent or None has a default."""
    given = {name: value for name, value in settings.items() if value is not None}
    check_all(given, LLAMA | TRANSLATED | OF_CACHES)
