"""`oncelm train`: a text file or folder to a trained model in a Hugging Face folder."""

from __future__ import annotations

import argparse
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from oncelm.data.dataset import TokenDataset
    from oncelm.train.config import TrainConfig
    from oncelm.train.parallel.ranks import Ranks

HELP = "train a model on a text file or a folder of text"

DESCRIPTION = """\
Train a language model on a text file, or on every .txt file of a folder.

DIR receives metrics.jsonl and TensorBoard curves, checkpoints and, at the end, the model in DIR/model,
which `oncelm generate --model DIR/model` reads. Ctrl-C saves a checkpoint; --resume goes on from it and
repeats the run exactly as if it had never stopped.

examples:
  oncelm train book.txt --out runs/book
      a tiny YOCO on the bytes of one book
  oncelm train books/ --out runs/books --config recipes/tiny-cpu.yaml --steps 2000
      a recipe, with one setting of it replaced
  oncelm train books/ --out runs/bpe --model yoco-small --tokenizer bpe:4096 --set lr=1e-3 seq_len=1024
      any setting by name; a tokenizer of 4096 entries is made from the data
  oncelm train books/ --out runs/wide --set model_overrides.hidden_size=384
      a preset with another shape
  oncelm train --out runs/books --resume
      go on with a stopped run, settings included
  torchrun --nproc-per-node 8 -m oncelm train books/ --out runs/books --set chunk_parallel=2
      on 8 GPUs, each sequence split over 2 of them; the same batches, and so the same losses, as on one
  oncelm train books/ --out runs/books --dry-run
      print what would be done: every setting, the parameters, the tokens in a step
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", metavar="DATA", help="a text file, or a folder of .txt files")
    parser.add_argument("--out", metavar="DIR", help="the run's folder")
    parser.add_argument("--model", help="a preset, or the folder of a model to start from (yoco-tiny)")
    parser.add_argument("--tokenizer", help="bytes, cl100k_base, bpe:SIZE or a path (bytes)")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps (1000)")
    parser.add_argument("--config", metavar="RECIPE", help="a YAML file of settings, as in recipes/")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="replace any setting; --dry-run lists them",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint in DIR, if there is one"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and stop")


def run(args: argparse.Namespace) -> int:
    config = read_config(args)
    if args.dry_run:
        print(describe(config))
        return 0

    from oncelm.train.parallel.ranks import join_ranks
    from oncelm.train.trainer import Trainer

    try:
        with join_ranks(config.device, tensor=config.tensor_parallel, chunk=config.chunk_parallel) as ranks:
            model, dataset, tokenizer = prepare(config, ranks)
            result = Trainer(model, dataset, config, tokenizer, ranks).fit()
    except FloatingPointError as error:
        print(f"oncelm: training stopped: {error}", file=sys.stderr)
        return 1
    if not ranks.is_main:
        return 0
    if result.interrupted:
        print(f"Stopped after step {result.step}; go on with: oncelm train --out {config.out} --resume")
        return 0
    held_out = "" if result.validation_loss is None else f", validation loss {result.validation_loss:.4f}"
    print(f"{result.step} steps, {result.tokens:,} tokens in {result.seconds:.0f} s{held_out}")
    print(f"Model: {result.model_path}")
    return 0


def read_config(args: argparse.Namespace) -> TrainConfig:
    """The settings of a command line: recipe, then options, then --set; a resumed run starts from its own."""
    from oncelm.train.config import load_config

    recipe = args.config
    if args.resume and recipe is None and args.out is not None:
        own = Path(args.out) / "config.yaml"
        recipe = own if own.exists() else None
    options = {name: getattr(args, name) for name in ("data", "out", "model", "tokenizer", "steps")}
    values: dict[str, object] = {name: value for name, value in options.items() if value is not None}
    return load_config(recipe, args.set, values | {"resume": args.resume})


def prepare(config: TrainConfig, ranks: Ranks) -> tuple[PreTrainedModel, TokenDataset, PreTrainedTokenizerBase]:
    """The model, the data and the tokenizer that a run's settings name; only the first rank's model has values."""
    import torch

    from oncelm.data.dataset import TokenDataset, tokenize

    tokenizer = make_tokenizer(config, ranks)
    tokens = ranks.main_first(lambda: tokenize(config.data, tokenizer))
    dataset = TokenDataset(tokens, config.seq_len, seed=config.seed, validation_share=config.validation_share)
    with contextlib.nullcontext() if ranks.is_main else torch.device("meta"):
        model = make_model(config, len(tokenizer))
    vocab_size = model.config.vocab_size
    if tokens.max() >= vocab_size:
        raise ValueError(
            f"tokenizer {config.tokenizer!r} gives token {tokens.max()}, but model {config.model!r} knows "
            f"{vocab_size} tokens only; use the tokenizer it was made with."
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):  # for `generate`, once it is trained
        setattr(model.config, name, getattr(tokenizer, name))
        if model.generation_config is not None:
            setattr(model.generation_config, name, getattr(tokenizer, name))
    return model, dataset, tokenizer


def make_tokenizer(config: TrainConfig, ranks: Ranks | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer the settings name; one made from the data is kept in `out/tokenizer` to resume with."""
    from oncelm.data.dataset import read_documents
    from oncelm.data.tokenizers import load_tokenizer, train_bpe
    from oncelm.train.config import bpe_vocab_size
    from oncelm.utils.files import atomic_folder

    if config.tokenizer is None:
        return load_tokenizer(config.model if Path(config.model).is_dir() else "bytes")
    if not config.tokenizer.startswith("bpe:"):
        return load_tokenizer(config.tokenizer)
    kept = Path(config.out) / "tokenizer"

    def train(size: int) -> None:
        if not (config.resume and kept.exists()):
            tokenizer = train_bpe(read_documents(config.data), size)
            with atomic_folder(kept) as folder:
                tokenizer.save_pretrained(folder)

    size = bpe_vocab_size(config.tokenizer)
    train(size) if ranks is None else ranks.on_main(lambda: train(size))
    return load_tokenizer(kept)


def make_model(config: TrainConfig, vocab_size: int) -> PreTrainedModel:
    """The model the settings name: a folder's, or a new one of a preset."""
    from oncelm import models

    if not Path(config.model).is_dir():
        overrides: dict[str, Any] = {"vocab_size": vocab_size} | config.model_overrides
        return models.build_model(config.model, seed=config.seed, **overrides)
    if config.model_overrides:
        raise ValueError(f"model_overrides change a preset, but model {config.model!r} is a folder; leave them out.")
    return models.load(config.model)


def describe(config: TrainConfig) -> str:
    """What a run would do; nothing is written, and a preset's weights are not allocated."""
    import torch

    from oncelm.data.dataset import text_files
    from oncelm.train.config import bpe_vocab_size

    files = text_files(config.data)
    size = sum(file.stat().st_size for file in files) / 2**20
    if config.tokenizer is not None and config.tokenizer.startswith("bpe:"):
        vocab_size = bpe_vocab_size(config.tokenizer)
    else:
        vocab_size = len(make_tokenizer(config))
    is_preset = not Path(config.model).is_dir()
    with torch.device("meta") if is_preset else contextlib.nullcontext():
        model = make_model(config, vocab_size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    steps = f"{config.steps:,}" if config.steps else "as many as fit"
    limit = f", at most {config.max_seconds:g} s" if config.max_seconds else ""
    total = f" ({config.steps * config.tokens_per_step:,} tokens)" if config.steps else ""
    return (
        f"{config.to_yaml()}\n"
        f"data             {len(files)} file{'s' * (len(files) != 1)}, {size:.1f} MiB\n"
        f"parameters       {parameters:,}\n"
        f"tokens per step  {config.tokens_per_step:,}\n"
        f"steps            {steps}{limit}{total}"
    )
