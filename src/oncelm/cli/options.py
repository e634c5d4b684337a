"""Options that several verbs share: which model, with what memory, on which device; and what can be told from them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

DTYPE_HELP = "float32, bfloat16 or float16 (as the weights are stored)"


def layers(text: str) -> list[int]:
    """The layers in "8,16,24", as argparse's `type`."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"layer numbers with commas between, as in 8,16,24; got {text!r}")
    return [int(part) for part in parts]


SHARED: dict[str, dict[str, Any]] = {
    "tokenizer": {"metavar": "NAME", "help": "bytes, cl100k_base or a path (the model's; cl100k_base if official)"},
    "mem_layers": {
        "type": layers,
        "metavar": "I,J,...",
        "help": "read a LLaMA-family model as a LongLLaMA with memory in these layers",
    },
    "memory": {"metavar": "KIND", "help": "LongLLaMA: exact, cpu, disk or knn (exact: on the device)"},
    "last_context_length": {
        "type": int,
        "metavar": "N",
        "help": "LongLLaMA: tokens at the end that stay out of memory",
    },
    "device": {"help": "cpu, cuda, cuda:1, ... (a GPU if there is one)"},
    "dtype": {"help": DTYPE_HELP},
}


def add_options(parser: Any, *names: str) -> None:
    """Add some of SHARED to a parser, or a group of one."""
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", **SHARED[name])


def model_keys(args: argparse.Namespace) -> dict[str, Any]:
    """The keys of the model's configuration that the command line changes."""
    return {} if args.mem_layers is None else {"mem_layers": args.mem_layers}


def session_options(config: PreTrainedConfig, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What the command line says of caches and of reading, as `open_session` takes it; ValueError for what a model of
    this configuration does not take."""
    from oncelm.models.registry import adoption, family, titles

    able = family(config)
    options: dict[str, dict[str, Any]] = {"cache_options": {}, "read_options": {}}
    for name, kind in (("memory", "cache_options"), ("last_context_length", "read_options")):
        if (value := getattr(args, name)) is None:
            continue
        if name not in getattr(able, kind):
            raise ValueError(
                f"--{name.replace('_', '-')} is for {titles(lambda one: name in getattr(one, kind))} models, "  # noqa: B023
                f"{args.model} is a model of type {config.model_type}.{adoption(config.model_type)}"
            )
        options[kind][name] = value
    given = args.last_context_length
    if given is not None and not 1 <= given <= config.max_position_embeddings:
        window = config.max_position_embeddings
        raise ValueError(f"--last-context-length must be from 1 to the model's window of {window}, got {given}.")
    return options


def kv_dtype(config: PreTrainedConfig, args: argparse.Namespace) -> torch.dtype | None:
    """What --kv-dtype asks a cache to store, None for what it stores anyway; ValueError where models of this
    configuration cannot."""
    from oncelm.models.registry import family, titles
    from oncelm.utils.device import resolve_kv_dtype

    name = args.kv_dtype or "auto"
    wanted, able = resolve_kv_dtype(name), family(config)
    if wanted is not None and name not in able.kv_dtypes:
        if not able.has_own_cache:
            those = titles(lambda one: one.kv_dtypes)
            raise ValueError(f"--kv-dtype is for {those} models; {args.model} is a model of type {config.model_type}.")
        raise ValueError(f"--kv-dtype {name} is not for {able.title} models: auto, {' or '.join(able.kv_dtypes)}.")
    return wanted


def find_tokenizer(model: str, tokenizer: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer named, or else the model's own."""
    from oncelm.data.tokenizers import load_tokenizer
    from oncelm.models.resolve import is_preset

    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    if is_preset(model):
        raise ValueError(f"preset {model} has no tokenizer; name one, such as --tokenizer bytes.")
    try:
        return load_tokenizer(model)
    except ValueError as error:
        raise ValueError(f"{error} Name one with --tokenizer.") from error


def token_counts(text: str) -> list[int]:
    """ "4096,16K" as numbers."""
    from oncelm.eval.task import parse_tokens

    try:
        return [parse_tokens(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--lengths {text!r}: each of them {error}") from error


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """["num_key_value_heads=2"] as keys and YAML values."""
    from oncelm.utils.settings import parse_yaml

    parsed = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not key or not equals:
            raise ValueError(f"setting {setting!r} must have the form KEY=VALUE, as in num_key_value_heads=2.")
        parsed[key] = parse_yaml(text, f"setting {setting!r}")
    return parsed
