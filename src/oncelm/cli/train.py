"""`oncelm train`: a text file or folder to a trained model in a Hugging Face folder."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oncelm.train.config import TrainConfig

DESCRIPTION = """\
Train a language model on a text file, a folder of text (.txt, .jsonl, .jsonl.gz, .jsonl.zst, .parquet), a corpus
whose json/train.json weighs its sources, or a folder of tokens that `oncelm data prepare` made. Text is tokenized
once and kept; `oncelm data --help` has the formats.

DIR receives metrics.jsonl and TensorBoard curves, checkpoints and, at the end, the model in DIR/model,
which `oncelm generate --model DIR/model` reads. Ctrl-C saves a checkpoint; --resume goes on from it and
repeats the run exactly as if it had never stopped. `touch DIR/export` makes DIR/model now, while training goes on.

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
  oncelm train chats.jsonl --out runs/chat --model runs/books/model --set task=sft lr=1e-5
      supervised fine-tuning on conversations: only the assistant's tokens are learned
  oncelm train books/ --out runs/long --model path/to/llama --config recipes/longllama/small.yaml
      a LLaMA-family folder gets memory: a LongLLaMA, trained with crossbatch
  torchrun --nproc-per-node 8 -m oncelm train books/ --out runs/books --set context_parallel=2
      on 8 GPUs, each sequence split over 2 of them; the same batches, and so the same losses, as on one
  oncelm train books/ --dry-run
      print what would be done: every setting, parameters, memory, tokens (of N processes: --processes N)
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", nargs="?", metavar="DATA", help="text, a corpus or prepared tokens")
    parser.add_argument("--out", metavar="DIR", help="the run's folder (runs/ and DATA's name)")
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
    parser.add_argument("--dry-run", action="store_true", help="print what would be done and needed, and stop")
    parser.add_argument("--processes", type=int, metavar="N", help="with --dry-run: as if torchrun had started N (1)")


def run(args: argparse.Namespace) -> int:
    from oncelm.utils.constraints import Whole, check_options

    check_options(args, {"processes": Whole(1, 2**20)})
    config = read_config(args)
    import torch

    from oncelm.train.parallel.mesh import join_mesh
    from oncelm.train.setup import describe_run, make_trainer

    if args.dry_run:
        print(describe_run(config, args.processes or int(os.environ.get("WORLD_SIZE", "1"))))
        return 0
    try:
        with join_mesh(config.device, tensor=config.tensor_parallel, context=config.context_parallel) as mesh:
            result = make_trainer(config, mesh).train()
    except FloatingPointError as error:
        print(f"oncelm: training stopped: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(
            f"oncelm: {' '.join(str(error).split())[:160]}... Less memory is needed with a smaller batch_size (and a "
            "larger grad_accumulation), activation_checkpointing=true or more processes; --dry-run estimates it.",
            file=sys.stderr,
        )
        return 1
    if not mesh.is_main:
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
    from oncelm.train.config import TrainConfig, default_out

    recipe = args.config
    named = args.out is not None or any(override.startswith("out=") for override in args.set)
    out = default_out(args.data) if args.data is not None and not named else args.out
    if args.resume and recipe is None and out is not None:
        own = Path(out) / "config.yaml"
        recipe = own if own.exists() else None
    options = {name: getattr(args, name) for name in ("data", "out", "model", "tokenizer", "steps")}
    values: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    return TrainConfig.from_yaml(recipe, args.set, **values, resume=args.resume)
