"""Checks of generation_config.json: transformers checks little of it before generation has begun."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oncelm.utils.constraints import POSITIVE, Each, Flag, Keyed, Number, Text, Whole, check_all
from oncelm.utils.errors import shown
from oncelm.utils.settings import read_json

FILE = "generation_config.json"
TOKENS = Each(Whole(-1), or_one=True)
LISTED = Each(Whole(0))

CONSTRAINTS = {
    **dict.fromkeys(("bos_token_id", "pad_token_id"), Whole(-1)),  # -1 in the first LLaMA's folders: none
    **dict.fromkeys(("eos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"), TOKENS),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), LISTED),
    **dict.fromkeys(("bad_words_ids", "force_words_ids"), Each(LISTED)),
    **dict.fromkeys(("max_new_tokens", "max_cache_len", "prefill_chunk_size", "num_beams"), Whole(1)),
    **dict.fromkeys(("num_return_sequences", "num_beam_groups", "max_matching_ngram_size"), Whole(1)),
    **dict.fromkeys(("num_assistant_tokens", "prompt_lookup_num_tokens", "assistant_early_exit"), Whole(1)),
    **dict.fromkeys(("assistant_lookbehind", "target_lookbehind"), Whole(1)),
    **dict.fromkeys(("max_length", "min_length", "min_new_tokens", "top_k"), Whole(0)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), Whole(0)),
    **dict.fromkeys(("top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"), Number(0, 1)),
    **dict.fromkeys(("assistant_confidence_threshold", "assistant_ensemble_weight", "penalty_alpha"), Number(0, 1)),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "max_time"), POSITIVE),
    **dict.fromkeys(("length_penalty", "diversity_penalty", "guidance_scale"), Number()),
    "temperature": Number(0),
    "exponential_decay_length_penalty": Each(Number(), count=2),
    **dict.fromkeys(("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "low_memory"), Flag()),
    **dict.fromkeys(("output_scores", "output_logits", "output_attentions", "output_hidden_states"), Flag()),
    **dict.fromkeys(("return_dict_in_generate", "token_healing", "is_assistant", "disable_compile", "use_mtp"), Flag()),
    **dict.fromkeys(("cache_implementation", "num_assistant_tokens_schedule", "speculation_type"), Text()),
    "stop_strings": Each(Text(), or_one=True),
    **dict.fromkeys(("cache_config", "watermarking_config"), Keyed()),
}


def check_generation_file(folder: str | os.PathLike[str]) -> None:
    """`check_generation` of a model folder's generation_config.json, if there is one: before transformers reads it."""
    file = Path(folder, FILE)
    if not file.is_file():
        return
    settings = read_json(file)
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must hold a JSON object, got {shown(settings)}.")
    check_generation(folder, settings)


def check_generation(path: str | os.PathLike[str], settings: Mapping[str, Any]) -> None:
    """ValueError naming the first key whose value no generation could follow; None is not set."""
    given = {name: value for name, value in settings.items() if value is not None}
    given = {name: value for name, value in given.items() if not hasattr(value, "to_dict")}  # objects of transformers
    try:
        check_all(given, CONSTRAINTS)
    except ValueError as error:
        raise ValueError(f"{FILE} of {path}: {error}") from None
