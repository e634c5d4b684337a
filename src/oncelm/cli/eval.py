"""`oncelm eval`: ask a model the examples of a task, and keep every answer."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HELP = "evaluate a model: passkey retrieval at any length"

DESCRIPTION = """\
Ask MODEL the examples of TASK. Every sample is a line of JSON in --out, written before the next one starts;
the same command again goes on where it stopped. Examples depend on the seed alone, decoding is greedy.

tasks:
  passkey   a number stands once in a long, dull text and is asked for at the end: exact answers by length

examples:
  oncelm eval passkey long_llama_3b/ --lengths 4K,16K,64K --out passkey.jsonl --plot passkey.png
      20 trials a length, the number at a random place in each
  oncelm eval passkey long_llama_3b/ --lengths 32K --depths 0,25,50,75,100 --trials 5 --out depths.jsonl
      at given places, in percent of the text
  oncelm eval passkey smollm2/ --mem-layers 8,16,24 --memory cpu --last-context-length 1024 --lengths 8K --out m.jsonl
      a LLaMA-family model as a LongLLaMA, its memory in CPU memory
"""

TASKS = {"passkey": "oncelm.eval.passkey"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("task", metavar="TASK", help=" or ".join(TASKS))
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face or official YOCO folder, or hub id")
    parser.add_argument("--out", required=True, metavar="FILE", help="the .jsonl file of results, new or to continue")
    parser.add_argument("--lengths", default="4K", metavar="N,N,...", help="tokens of the prompts, K for 1024 (4K)")
    parser.add_argument("--depths", metavar="P,P,...", help="places in percent of the text (random ones)")
    parser.add_argument("--trials", type=int, default=20, metavar="N", help="samples of each length and depth (20)")
    parser.add_argument("--seed", type=int, default=0, help="which examples (0)")
    parser.add_argument("--plot", metavar="FILE", help="a PNG of accuracy by length")
    parser.add_argument("--tokenizer", metavar="NAME", help="bytes, cl100k_base or a path (the model's)")
    parser.add_argument("--mem-layers", metavar="I,J,...", help="read a LLaMA-family model as a LongLLaMA")
    parser.add_argument("--window", type=int, metavar="N", help="LongLLaMA: tokens of its local context (the config's)")
    parser.add_argument("--last-context-length", type=int, metavar="N", help="LongLLaMA: tokens kept out of memory")
    parser.add_argument("--memory", metavar="KIND", help="LongLLaMA: exact, cpu, disk or knn")
    parser.add_argument("--device", help="cpu, cuda, ... (a GPU if there is one)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (as the weights are stored)")


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from oncelm.cli.bench import parse_lengths
    from oncelm.cli.generate import check_memory_options, find_tokenizer, parse_layers
    from oncelm.eval import Reader, evaluate, passkey
    from oncelm.eval.report import accuracy_by_length, plot_accuracy
    from oncelm.models.load import load, quiet_transformers, read_config
    from oncelm.utils.errors import check_choice

    check_choice("task", args.task, TASKS)
    if Path(args.out).is_dir():
        raise ValueError(f"--out {args.out} is a folder; name a .jsonl file.")
    overrides: dict[str, Any] = {} if args.mem_layers is None else {"mem_layers": parse_layers(args.mem_layers)}
    if args.window is not None:
        overrides["max_position_embeddings"] = args.window
    args.prefill_chunk_size = None
    check_memory_options(read_config(args.model, **overrides), args)
    tokenizer = find_tokenizer(args.model, args.tokenizer)
    lengths, depths = parse_lengths(args.lengths), parse_depths(args.depths)
    examples = passkey.examples(tokenizer, lengths, depths, args.trials, args.seed)
    model = load(args.model, args.device, args.dtype, **overrides)
    settings = {
        "task": args.task,
        "model": identity(args.model, model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "memory": args.memory,
        "last_context_length": args.last_context_length,
    }
    reader = Reader(
        model,
        tokenizer,
        {} if args.memory is None else {"memory": args.memory},
        {} if args.last_context_length is None else {"last_context_length": args.last_context_length},
    )
    total = len(lengths) * len(depths) * args.trials
    with quiet_transformers():
        lines = evaluate(reader, examples, passkey.score, settings, args.out)
        results = list(tqdm(lines, total=total, desc=args.task, disable=None))
    for length, (right, count) in accuracy_by_length(results).items():
        print(f"{length:>10,} tokens  {right / count:.3f}  ({right} of {count})")
    if args.plot:
        plot_accuracy(results, f"{args.task}: {Path(args.model).name}", args.plot)
        print(f"plot: {args.plot}", file=sys.stderr)
    return 0


def parse_depths(text: str | None) -> list[float | None]:
    """The places in "0,50,100"; None: random ones."""
    if text is None:
        return [None]
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"--depths must be percents with commas between, as in 0,50,100; got {text!r}.") from error


def identity(name: str, model: PreTrainedModel) -> str:
    """What tells one model's results from another's: its name, and a hash of its weights where it has one."""
    own = getattr(model, "fingerprint", None)
    return Path(name).name + (f" {own()}" if own else "")
