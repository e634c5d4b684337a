"""How `oncelm generate` chooses tokens: as the command line says; where a text ends, the model's folder says."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)

# What counts of a folder's generation_config.json: special tokens, where a text ends, which tokens may come.
HONOURED = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("min_length", "min_new_tokens", "max_time", "forced_bos_token_id", "forced_eos_token_id"),
    *("repetition_penalty", "no_repeat_ngram_size", "exponential_decay_length_penalty"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"),
    *("renormalize_logits", "remove_invalid_values", "watermarking_config"),
)
# What is read otherwise (stop strings), what the command line has options for, what changes no text, what belongs to
# other ways to generate and does nothing without them.
REPLACED = (
    "stop_strings",
    *("do_sample", "temperature", "top_k", "top_p", "max_length", "max_new_tokens", "prefill_chunk_size"),
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
    *("transformers_version", "_from_model_config", "low_memory", "length_penalty", "early_stopping", "is_assistant"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
    *("assistant_ensemble_weight", "prompt_lookup_num_tokens", "speculation_type", "continuous_batching_config"),
)


def keep_what_fits(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> StoppingCriteriaList:
    """Leave in the model's own generation config what goes with one token after the other, and warn of the rest.

    Beam search, for one, has no text to print before its end. Returned are the texts that end a text.
    """
    own = model.generation_config
    assert own is not None  # every model that can generate has one
    values = {name: value for name, value in vars(own).items() if value is not None}
    known = vars(GenerationConfig())
    other = {name: value for name, value in values.items() if name in known and name not in (*HONOURED, *REPLACED)}
    left_out = [f"{name}={value}" for name, value in other.items() if value not in (0, 1)]  # False and True too
    if left_out:
        print(
            f"oncelm: warning: left out of the model's generation_config.json: {', '.join(left_out)}; "
            "`oncelm generate` writes one token after the other, chosen as its options say.",
            file=sys.stderr,
        )
    model.generation_config = GenerationConfig(**{name: values[name] for name in HONOURED if name in values})
    stops = values.get("stop_strings")
    return StoppingCriteriaList([StopStringCriteria(tokenizer, stops)] if stops else [])


def sampling(args: argparse.Namespace, **more: Any) -> GenerationConfig:
    """The command line as a GenerationConfig; `generate` adds what `keep_what_fits` has left in the model's own."""
    import torch

    if args.seed is not None:
        torch.manual_seed(args.seed)
    if args.temperature == 0:
        return GenerationConfig(max_new_tokens=args.max_new_tokens, do_sample=False, use_cache=True, **more)
    return GenerationConfig(
        max_new_tokens=args.max_new_tokens,
        do_sample=True,
        temperature=args.temperature,
        top_p=1.0 if args.top_p is None else args.top_p,
        top_k=args.top_k or 0,  # transformers would draw from the likeliest 50 by default
        use_cache=True,
        **more,
    )
