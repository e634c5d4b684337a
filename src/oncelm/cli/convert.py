"""`oncelm convert`: official YOCO folders and GGUF files to Hugging Face folders, and official folders back."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DESCRIPTION = """\
Convert a model from the official YOCO format (params.json, checkpoint.pth), or a training run's checkpoint, to a
Hugging Face folder (config.json, model.safetensors), or from there to the official format. Logits stay the same.
A GGUF file of a LLaMA-family model becomes a Hugging Face folder too, its quantisation undone, with its tokenizer.
Whatever the file says that the folder would not honour is refused by name.

TARGET appears when it is complete, and not before. One that exists is refused, or with --overwrite replaced
at the very end. A Hugging Face folder gets a tokenizer: the one named, or SOURCE's own, or cl100k_base where
the model has its vocabulary. Official folders have none. SHA256SUMS, a checksum of each file, goes with either
(`oncelm info --verify`, or sha256sum --check); those of a checkpoint are checked before it is converted.

examples:
  oncelm convert yoco-3b-official/ yoco-3b/
      official to Hugging Face, with the cl100k_base tokenizer
  oncelm convert yoco-3b-official/ yoco-3b/ --dtype bfloat16
      in half the space
  oncelm convert runs/book/model book-official/
      Hugging Face to official: params.json and checkpoint.pth for the official code
  oncelm convert runs/book/model book-bf16/ --to hf --dtype bfloat16
      Hugging Face to Hugging Face, in another dtype
  oncelm convert runs/book/checkpoints/step-001000 book-1000/
      a training run's checkpoint, of one process or many, to Hugging Face
  oncelm convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2/ --dtype bfloat16
      llama.cpp's format to Hugging Face; then `oncelm generate --model smollm2/ --mem-layers 8,16,24 ...`
"""

FORMATS = {"hf": "Hugging Face", "official": "official"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="the folder to read, of either format, a GGUF file, or a hub id"
    )
    parser.add_argument("target", metavar="TARGET", help="the folder to write")
    parser.add_argument(
        "--to",
        metavar="FORMAT",
        help="hf or official: the format to write (of a model the other one, else hf)",
    )
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (as the weights are stored)")
    parser.add_argument("--tokenizer", metavar="NAME", help="bytes, cl100k_base or a path, to save beside the model")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it exists")


def run(args: argparse.Namespace) -> int:
    from oncelm.models.gguf import is_gguf
    from oncelm.models.load import load, read_config
    from oncelm.models.registry import family, official_format, titles
    from oncelm.utils.checksums import MANIFEST
    from oncelm.utils.errors import check_choice
    from oncelm.utils.files import bring_back

    source, target = Path(args.source), Path(args.target)
    for folder in (source, target):  # a --overwrite that was killed may have left it aside
        bring_back(folder)
    is_model = not (official_format(source) is not None or is_gguf(source) or (source / MANIFEST).is_file())
    to = args.to or ("official" if is_model else "hf")
    check_choice("--to", to, FORMATS)
    check_target(source, target, args.overwrite)
    if is_gguf(source):
        return convert_gguf(source, target, to, args)
    config = read_config(args.source)
    tokenizer = None
    if to == "hf":
        tokenizer = choose_tokenizer(source, args.tokenizer, config.get_text_config().vocab_size)
    elif not (official := family(config).official_format):
        those = titles(lambda one: one.official_format)
        raise ValueError(f"only {those} models have an official format; {source} is of type {config.model_type}.")
    elif args.tokenizer:
        raise ValueError("--tokenizer goes with --to hf: the official format has no tokenizer.")

    model = load(args.source, device="cpu", dtype=args.dtype, config=config)
    if to == "hf":
        write_hugging_face(model, tokenizer, target)
    else:
        resolve_name(official).write_official(model, target)
    report(model, target, to)
    if to == "hf" and tokenizer is None:
        print("no tokenizer found to save beside it; name one with --tokenizer.", file=sys.stderr)
    return 0


def convert_gguf(source: Path, target: Path, to: str, args: argparse.Namespace) -> int:
    """A GGUF file to a Hugging Face folder."""
    from oncelm.models.gguf import read_gguf
    from oncelm.utils.device import resolve_dtype

    if to != "hf" or args.tokenizer:
        raise ValueError(f"{source} is a GGUF file: it becomes a Hugging Face folder (--to hf) with its own tokenizer.")
    model, tokenizer = read_gguf(source, None if args.dtype is None else resolve_dtype(args.dtype))
    write_hugging_face(model, tokenizer, target)
    report(model, target, to)
    return 0


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse to write over anything that was not meant."""
    if source.resolve().is_relative_to(target.resolve()):
        raise ValueError(f"TARGET {target} is SOURCE or contains it; choose another folder.")
    if not target.exists():
        return
    if not overwrite:
        raise ValueError(f"TARGET {target} exists; choose another folder, or replace it with --overwrite.")
    model_files = ("config.json", "params.json")
    if not target.is_dir() or (any(target.iterdir()) and not any((target / file).is_file() for file in model_files)):
        raise ValueError(f"TARGET {target} is no model folder, and --overwrite replaces model folders only.")


def choose_tokenizer(source: Path, named: str | None, vocab_size: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer to save beside a model: the one named, the source's own, or cl100k_base if it fits."""
    from oncelm.data.tokenizers import CL100K_VOCAB_SIZE, TOKENIZER_FILES, load_tokenizer

    if named is None:
        if any(next(source.glob(pattern), None) for pattern in TOKENIZER_FILES):
            named = str(source)
        elif vocab_size == CL100K_VOCAB_SIZE:
            named = "cl100k_base"
        else:
            return None
    tokenizer = load_tokenizer(named)
    if len(tokenizer) > vocab_size:
        raise ValueError(f"tokenizer {named!r} has {len(tokenizer):,} tokens, the model knows {vocab_size:,} only.")
    return tokenizer


def write_hugging_face(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, target: Path) -> None:
    """Write a Hugging Face folder; `target` changes only once everything is written."""
    from oncelm.models.load import quiet_transformers
    from oncelm.utils.checksums import write_checksums
    from oncelm.utils.files import atomic_folder

    with atomic_folder(target) as folder, quiet_transformers():
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_checksums(folder)


def report(model: PreTrainedModel, target: Path, to: str) -> None:
    """Say what was written."""
    from oncelm.utils.units import size

    dtype = str(model.dtype).removeprefix("torch.")
    print(f"{target}: {FORMATS[to]} format, {model.num_parameters():,} parameters in {dtype}")
    for file in sorted(target.iterdir()):
        print(f"  {file.name:<24} {size(file.stat().st_size):>12}")
