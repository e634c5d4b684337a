"""`oncelm info`: what is installed, or what a model is, from its configuration and the headers of its files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oncelm.cli.options import add_options
from oncelm.cli.output import new_table, print_tables

if TYPE_CHECKING:
    import torch
    from rich.table import Table
    from transformers import PreTrainedConfig, PreTrainedModel

DESCRIPTION = """\
Without MODEL: versions, devices, which implementation computes each operation on which device, and the presets.
With MODEL: its shape, parameters, bytes of weights and of cache at several lengths, context length and tokenizer.
Only the configuration and the headers of the files are read, never the weights (but with --verify), so that it takes no
time and no memory for any size.

examples:
  oncelm info
      is the GPU seen, and what would be used on it?
  oncelm info yoco-3b
      how large is the preset, and its cache at a million tokens?
  oncelm info runs/book/model
      a Hugging Face folder; official YOCO folders and hub ids work as well
  oncelm info --verify runs/book/model
      is every file as it was written? (each against its checksum in SHA256SUMS, or in a checkpoint's manifest.json)
  oncelm info smollm2/ --mem-layers 8,16,24
      a LLaMA-family folder, as the LongLLaMA that it would be with these memory layers
"""

CACHE_LENGTHS = {"4K": 4 << 10, "32K": 32 << 10, "128K": 128 << 10, "1M": 1 << 20}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model folder, a preset, a hub id or a GGUF file")
    add_options(parser, "mem_layers")
    parser.add_argument("--verify", action="store_true", help="compare each file of a model folder with its checksum")


def run(args: argparse.Namespace) -> int:
    from oncelm.utils.checksums import check_folder

    if args.verify:
        if args.model is None:
            raise ValueError("--verify goes with a MODEL.")
        print(f"{args.model}: {check_folder(args.model)} files are as they were written.")
    if args.model is None and args.mem_layers is not None:
        raise ValueError("--mem-layers goes with a MODEL.")
    for table in installation() if args.model is None else describe(args.model, args.mem_layers):
        print_tables(table)
    return 0


# -- the installation -------------------------------------------------------------------------------------------------


def installation() -> list[Table]:
    """The environment, the dispatch table of the ops, and the presets."""
    from oncelm.models import build
    from oncelm.models.registry import FAMILIES, presets
    from oncelm.ops.dispatch import ANY, TABLE
    from oncelm.utils.environment import environment_report

    environment = new_table("Environment")
    for name, value in environment_report().items():
        environment.add_row(name.removesuffix("_bytes"), readable(name, value))

    ops = new_table(
        "Operations: what serves which device (used: by default there)", "operation", "backend", *ANY, "how"
    )
    for op, rows in TABLE.items():
        for row in rows:
            uses = [
                next(other for other in rows if device in other.devices and other.available) is row for device in ANY
            ]
            runs = [
                "used" if use else "runs" if device in row.devices else ""
                for device, use in zip(ANY, uses, strict=True)
            ]
            ops.add_row(op if row is rows[0] else "", row.backend, *runs, row.note)

    shapes = new_table("Presets", "name", "|layers", "|width", "|parameters", "|without embeddings")
    for name, keys in presets().items():
        if keys["model_type"] in FAMILIES:  # the others are what these are compared with
            model = build(name, weights=False)
            config, (total, inner) = model.config, count_parameters(model)
            shapes.add_row(name, str(config.num_hidden_layers), f"{config.hidden_size:,}", f"{total:,}", f"{inner:,}")
    return [environment, ops, shapes]


def readable(name: str, value: Any) -> str:
    """A value of the environment report as text."""
    from oncelm.utils.units import size

    if name.endswith("_bytes"):
        return size(value)
    if isinstance(value, dict):
        return ", ".join(readable(key, inner) for key, inner in value.items())
    if isinstance(value, list):
        return "; ".join(readable(name, inner) for inner in value) or "none"
    return "none" if value is None else str(value)


# -- a model ----------------------------------------------------------------------------------------------------------


def describe(name: str, mem_layers: list[int] | None = None) -> list[Table]:
    """What a model folder, hub id or preset is; as a LongLLaMA with these memory layers if some are named."""
    from oncelm import models
    from oncelm.models.load import errors_in_one_line

    config = models.describe(name, **({} if mem_layers is None else {"mem_layers": mem_layers}))
    with errors_in_one_line(name):  # a model of another kind than causal language models, or with odd keys
        return tables_of(name, config, models.build(name, weights=False, config=config))


def tables_of(name: str, config: PreTrainedConfig, model: PreTrainedModel) -> list[Table]:
    """What the model is, and what its cache takes."""
    from oncelm.models.registry import family
    from oncelm.utils.units import size

    total, inner = count_parameters(model)
    loaded, told = stored_in(name, config)
    text = config.get_text_config()
    shape = new_table(name)
    shape.add_row("architecture", f"{type(model).__name__} ({config.model_type})")
    for part, description in family(text).layers_in_words(text):
        shape.add_row(part, description)
    shape.add_row(
        "vocabulary", f"{text.vocab_size:,} tokens, {'tied' if config.tie_word_embeddings else 'untied'} embeddings"
    )
    shape.add_row("parameters", f"{total:,}; {inner:,} without embeddings")
    weights = ", ".join(
        f"{size(total * bytes_each)} in {dtype}" for dtype, bytes_each in (("float32", 4), ("bfloat16", 2))
    )
    shape.add_row("weights", weights + told)
    limit = getattr(text, "max_position_embeddings", None)
    windows = family(text).reads_by_windows
    trained = "tokens a window; memory has no limit" if windows else "tokens, as trained"
    shape.add_row("context length", "not stated" if limit is None else f"{limit:,} {trained}")
    shape.add_row("tokenizer", tokenizer_of(name, text.vocab_size))
    return [shape, *cache_tables(model, text, loaded)]


def count_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters in all, and without the embeddings and the output projection."""
    total = sum(parameter.numel() for parameter in model.parameters())
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    outer = {id(end.weight): end.weight.numel() for end in ends if end is not None}
    return total, total - sum(outer.values())


def cache_tables(model: PreTrainedModel, config: PreTrainedConfig, loaded: torch.dtype | None) -> list[Table]:
    """The cache of one sequence at several lengths; none for a model whose cache follows other rules."""
    import torch

    from oncelm.models.registry import family
    from oncelm.utils.units import size

    dtype = loaded or torch.bfloat16
    title = f"Cache of one sequence, in {dtype_name(dtype)}"
    if (able := family(config)).has_own_cache:
        peer = able.peer_config(config)
        table = new_table(title, "|tokens", "|this model", "|Llama of this shape", "|Llama / this")
        for label, tokens in CACHE_LENGTHS.items():
            own, llama = model.cache_bytes(tokens, dtype), llama_cache_bytes(peer, tokens, dtype)
            table.add_row(label, size(own), size(llama), f"{llama / own:.1f}")
        return [table]
    if (
        set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}
        or kv_heads(config) is None
    ):
        return []
    table = new_table(title, "|tokens", "|this model")
    for label, tokens in CACHE_LENGTHS.items():
        table.add_row(label, size(llama_cache_bytes(config, tokens, dtype)))
    return [table]


def llama_cache_bytes(config: PreTrainedConfig, tokens: int, dtype: torch.dtype) -> int:
    """Keys and values of every layer of a Transformer with this configuration's layers and heads."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * kv_heads(config) * head_dim * tokens * dtype.itemsize


def kv_heads(config: PreTrainedConfig) -> Any:
    return getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)


def stored_in(name: str, config: PreTrainedConfig) -> tuple[torch.dtype | None, str]:
    """The dtype that the weights are loaded in, if that can be told, and in words the one that they are stored in."""
    import torch

    from oncelm.models.stored import stored_dtypes

    stated = getattr(torch, config.dtype) if isinstance(config.dtype, str) else config.dtype
    said = f"; {dtype_name(stated)} by its configuration" if stated else ""
    try:
        found = stored_dtypes(name)
    except ValueError as error:
        return stated, f"{said}; {error}"
    if not found:
        return stated, said
    parts = list(found) if len(found) == 1 else [f"{dtype} ({count:,} numbers)" for dtype, count in found.items()]
    floats = (getattr(torch, dtype, None) for dtype in found)
    loaded = stated or next((dtype for dtype in floats if dtype is not None and dtype.is_floating_point), None)
    words = f"; stored in {' and '.join(parts)}"
    if loaded is not None and list(found) != [dtype_name(loaded)]:
        words += f", loaded in {dtype_name(loaded)}" + (" as its configuration says" if stated else "")
    return loaded, words


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tokenizer_of(name: str, vocab_size: int) -> str:
    """The tokenizer in a model's folder, in words."""
    from oncelm.data.tokenizers import CL100K_VOCAB_SIZE, TOKENIZER_FILES, load_tokenizer

    folder = Path(name)
    if any(next(folder.glob(pattern), None) for pattern in TOKENIZER_FILES):
        tokenizer = load_tokenizer(folder)
        return f"{type(tokenizer).__name__}, {len(tokenizer):,} tokens"
    return "none beside it" + ("; the vocabulary is cl100k_base's" if vocab_size == CL100K_VOCAB_SIZE else "")
