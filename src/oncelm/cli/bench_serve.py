"""`oncelm bench serve`: a workload on the engine, or on any address that speaks OpenAI's protocol."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from oncelm.cli.options import add_options, find_tokenizer, parse_settings
from oncelm.cli.output import print_tables
from oncelm.utils.files import check_place

if TYPE_CHECKING:
    from oncelm.bench.record import Record
    from oncelm.bench.serve.play import Answer
    from oncelm.bench.serve.workload import Conversation

DESCRIPTION = """\
Replay a workload in real time, on the engine in this process (--model) or on any address that speaks OpenAI's protocol
(--url, streaming completions), and print percentiles of

  queue time           from a request's arrival until its prompt begins to be read (of the engine)
  TTFT                 time to first token, from its arrival
  TPOT                 time per output token: from the first to the last, by the tokens after the first
  ITL                  inter-token latency: between two moments at which tokens came
  end to end           from its arrival until it is finished

with tokens a second, how much of the prompts the prefix cache had, and memory. Prompts are random tokens, answers are
greedy and as long as the workload says. First a short request warms up and, on the engine, answers must agree with the
model's own forward pass.

A workload is a JSONL file or one that is drawn from --seed, NAME:KEY=VALUE,...; a length may be a range, input=512-32K:

  uniform    requests=32, input=8192, output=256, rate=0 (requests a second, at random times; 0: all at once)
  documents  documents=4, document=32768, questions=8 (on each), input=64, output=128, rate=0
  chat       conversations=16, turns=4, system=0 (a prompt that all share), input=256, output=128, think=1 (seconds
             before a turn, on average), rate=0

A line of a file is a request, or a conversation, whose prompts go on from all that was said; what is left out is 0:

  {"arrival": 0.5, "input": 512, "output": 64, "priority": 0}
  {"input": 40, "output": 64, "prefix": "a book", "prefix_length": 131072}
  {"input": "Once upon a time", "output": 32, "turns": [{"input": " And then?", "output": 32, "think": 5}]}

examples:
  oncelm bench serve --model yoco-tiny --workload uniform:requests=16,input=64-1K,output=32 --plot latencies.png
      mixed lengths at once, random weights
  oncelm bench serve --model yoco-3b --dtype bfloat16 --workload uniform:requests=32,input=32K,output=256 \\
      --engine kv_cache_dtype=float8 --out serve.jsonl
      options of oncelm.LLM; and appended to a file, with the environment
  oncelm bench serve --model runs/books/model --workload documents:documents=8,document=128K,questions=16,rate=2
      questions on documents, two a second
  oncelm bench serve --url http://127.0.0.1:8000 --workload chat:conversations=64,turns=6,rate=4
      the same on a server, such as vLLM's
  oncelm bench serve --url http://127.0.0.1:8000 --workload monday.jsonl --no-ignore-eos
      a file; nothing beyond OpenAI's own protocol is sent
"""

DEFAULT_WORKLOAD = "uniform:requests=16,input=1024,output=64"
ENGINE_ONLY = ("device", "dtype", "set", "engine", "tokenizer")
ADDRESS_ONLY = ("vocab_size", "api_key_env", "timeout")
VOCAB_SIZE, TIMEOUT = 10_000, 3600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", metavar="serve")
    work = parser.add_argument_group("the workload")
    work.add_argument("--workload", default=DEFAULT_WORKLOAD, metavar="WHAT", help=f"({DEFAULT_WORKLOAD})")
    work.add_argument("--seed", type=int, default=0, metavar="N", help="of the workload and its texts (0)")
    work.add_argument("--save-workload", metavar="FILE", help="write it as a file, to be replayed elsewhere")
    work.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write as many tokens as the workload says (yes); no: an address is sent OpenAI's fields only",
    )
    engine = parser.add_argument_group("the engine in this process")
    engine.add_argument("--model", metavar="NAME", help="a preset, or a folder; with --url: as it is named there")
    engine.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="keys of a preset's configuration"
    )
    engine.add_argument("--dtype", help="float32 (default on a CPU), bfloat16 (on a GPU) or float16")
    add_options(engine, "device", "tokenizer")
    engine.add_argument(
        "--engine", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="arguments of oncelm.LLM"
    )
    address = parser.add_argument_group("an address")
    address.add_argument(
        "--url", metavar="URL", help="such as http://127.0.0.1:8000; /v1 is added where there is no path"
    )
    address.add_argument("--vocab-size", type=int, metavar="N", help=f"prompts are ids below this ({VOCAB_SIZE:,})")
    address.add_argument("--api-key-env", metavar="NAME", help="the environment variable that holds the key (none)")
    address.add_argument(
        "--timeout", type=float, metavar="SECONDS", help=f"without a byte, after which a request failed ({TIMEOUT:,})"
    )
    results = parser.add_argument_group("results")
    results.add_argument("--plot", metavar="FILE", help="PNG or SVG of latencies, and of what went on when")
    results.add_argument("--out", "--output", metavar="FILE", help="append the figures to this file, as a line of JSON")


def run(args: argparse.Namespace) -> int:
    check_options(args)
    from oncelm.bench.gate import GateError
    from oncelm.bench.report import append_record
    from oncelm.bench.serve.figures import serve_table
    from oncelm.bench.serve.generate import generate
    from oncelm.bench.serve.plot import check_plot, plot_replay
    from oncelm.bench.serve.workload import read_workload, write_workload

    if args.plot:
        check_plot(args.plot)
    for option in ("plot", "out", "save_workload"):
        if getattr(args, option):
            check_place(getattr(args, option), f"--{option.replace('_', '-')}")  # now, not after minutes
    is_file = Path(args.workload).is_file()
    conversations = read_workload(args.workload) if is_file else generate(args.workload, args.seed)
    if args.save_workload:
        write_workload(args.save_workload, conversations)
    try:
        answers, record = (run_on_address if args.url else run_on_engine)(args, conversations)
    except GateError as error:
        print(f"oncelm: correctness gate: {error}", file=sys.stderr)
        return 1
    print_tables(serve_table(record))
    if args.out:
        append_record(args.out, record)
        print(f"Appended a line to {args.out}")
    if args.plot:
        plot_replay(answers, args.plot, f"{record['subject']}, {record['workload']}")
        print(f"Wrote {args.plot}")
    return 1 if record["failed"] == record["requests"] else 0


def check_options(args: argparse.Namespace) -> None:
    """ValueError for an option that would be ignored, or whose value makes no sense."""
    from oncelm.utils import constraints as allowed

    seconds = allowed.Number(0, 1e9, open_low=True)
    whole = {"vocab_size": allowed.Whole(1, 2**31), "seed": allowed.Whole(0)}
    allowed.check_options(args, {**whole, "timeout": seconds})
    if args.url is None and args.model is None:
        raise ValueError("name what to measure: --model NAME for the engine, or --url URL for an address.")
    for name in ENGINE_ONLY if args.url else ADDRESS_ONLY:
        if getattr(args, name) not in (None, []):
            where = "--url: it is for the engine in this process" if args.url else "--model: it is for a --url"
            raise ValueError(f"--{name.replace('_', '-')} does not go with {where}.")
    if args.api_key_env and args.api_key_env not in os.environ:
        raise ValueError(f"--api-key-env {args.api_key_env}: there is no such environment variable.")


def run_on_engine(args: argparse.Namespace, conversations: list[Conversation]) -> tuple[list[Answer], Record]:
    from oncelm.bench.serve.run import serve_engine
    from oncelm.engine.llm import LLM
    from oncelm.models import build
    from oncelm.utils.device import resolve_device, resolve_dtype

    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    options = parse_settings(args.engine)
    model = build(args.model, device, dtype, **parse_settings(args.set))
    tokenizer = find_tokenizer(args.model, args.tokenizer) if any(one.is_text for one in conversations) else None
    llm = LLM(model, tokenizer, **options)
    return serve_engine(
        llm,
        conversations,
        args.workload,
        name=args.model,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
    )


def run_on_address(args: argparse.Namespace, conversations: list[Conversation]) -> tuple[list[Answer], Record]:
    from oncelm.bench.serve.run import serve_address

    headers = {"Authorization": f"Bearer {os.environ[args.api_key_env]}"} if args.api_key_env else {}
    return serve_address(
        args.url,
        conversations,
        args.workload,
        model=args.model,
        headers=headers,
        vocab_size=args.vocab_size or VOCAB_SIZE,
        seed=args.seed,
        ignore_eos=args.ignore_eos,
        timeout=args.timeout or TIMEOUT,
    )
