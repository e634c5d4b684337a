"""`oncelm bench`: measured figures of a YOCO, beside a Llama of the same shape or other implementations."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oncelm.cli.options import add_options, find_tokenizer, kv_dtype, model_keys, parse_settings, token_counts
from oncelm.cli.output import print_tables
from oncelm.utils.files import check_place

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from oncelm.bench import OwnTarget, Target
    from oncelm.cli import Command
    from oncelm.eval import LanguageModel
    from oncelm.models.family import Family

DESCRIPTION = """\
Measure a YOCO (or a LongLLaMA) and, in the same run, transformers' Llama of the same width, depth, heads, vocabulary.

  prefill   seconds until the last token's logits and a cache are there (time to first token, TTFT)
  decode    seconds of one token behind a context of each length (time per output token, TPOT)
  memory    bytes of the cache, and the peak of a prefill above the weights
  train     seconds of forward, backward and an AdamW step
  ops       each op by itself beside other implementations of it (no model; --op chooses)
  harness   lm-eval's few-shot questions through our adapter, beside lm-eval's HFLM on the same model (needs --data)
  needle    a grid of needles, and what a prefill of the tokens that it reads would take
  serve     many requests as they come, on the engine or on any address (`oncelm bench serve --help`)

First both models must pass a correctness gate: prefill in chunks, decoding and the loss have to agree with the full
forward. Each time is the median after a warm-up; a call longer than 20 s is measured once. MFU and MBU are the shares
of this machine's measured FLOP/s and bytes/s that the work needs; the larger one is how near the roofline it comes.
Weights are random unless --model is a folder: speed does not depend on them.

The default shape is 512 wide with 12 layers, the paper's proportions at a size that a CPU measures in minutes. Its
vocabulary is LLaMA's 32,000: at this width, the 100,288 of official YOCO would outweigh all layers together.

examples:
  oncelm bench prefill
      4K to 64K tokens; Llama up to 32K, which takes it minutes on a CPU
  oncelm bench decode --lengths 4096,32768 --dtype bfloat16 --out decode.jsonl
      in bfloat16, and appended to a file: one JSON line a measurement, with the environment
  oncelm bench prefill --self-decoder sliding_window --hidden-size 256 --layers 8 --no-peer
      another shape, by itself
  oncelm bench memory --model yoco-3b --device cuda --lengths 131072,524288 --peer-max-length 131072
      a preset (`oncelm info` lists them), on a GPU
  oncelm bench decode --model smollm2 --mem-layers 8,16,24 --lengths 131072,524288 --peer-max-length 524288
      a LLaMA-family folder as a LongLLaMA, beside itself without memory, which keeps all keys of all layers
  oncelm bench ops --op linear_cross_entropy --op window_attention
      two ops; each must agree with its definition in float64 first
  oncelm bench harness --data data/harness --model yoco-160m --tokenizer cl100k_base --questions 3
      5-shot ARC and HellaSwag; the scores must agree to 1e-4 first (recipes/eval_data.py builds the folder)
  oncelm bench needle --model runs/books/model --lengths 131072
      11 depths x 10 runs; a model that finds needles stops writing when it has
"""

LENGTHS = {"train": "512,2048", "needle": "4096,16384"}
DEFAULT_LENGTHS = "4096,16384,32768,65536"
TIMED = ("prefill", "decode", "memory", "train")
PEER_MAX_LENGTH = 32768
BENCHMARKS = (*TIMED, "ops", "harness", "needle")

# options that go with some benchmarks only
GOES_WITH = {
    **dict.fromkeys(("model", "hidden_size", "layers", "self_decoder", "set"), (*TIMED, "harness", "needle")),
    **dict.fromkeys(("lengths", "prefill_chunk_size", "compile", "quantization"), (*TIMED, "needle")),
    **dict.fromkeys(("batch_size", "peer_max_length", "kv_dtype", "no_peer"), TIMED),
    "profile": ("prefill", "decode", "train"),
    "mem_layers": ("prefill", "decode", "memory"),
    "op": ("ops",),
    "tokenizer": ("harness", "needle"),
    **dict.fromkeys(("data", "tasks", "questions", "fewshot", "hflm_batch_size"), ("harness",)),
    **dict.fromkeys(("depths", "runs", "strict"), ("needle",)),
}


def command(arguments: list[str]) -> Command:
    """What `oncelm bench ...` stands for: serve, which has options of its own, or one of the others."""
    from oncelm.cli import Command, bench_serve

    if arguments[:1] == ["serve"]:
        return Command(bench_serve.DESCRIPTION, bench_serve.add_arguments, bench_serve.run)
    return Command(DESCRIPTION, add_arguments, run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("benchmark", metavar="WHAT", help=f"{', '.join(BENCHMARKS)} or serve")
    shape = parser.add_argument_group("the model")
    shape.add_argument(
        "--model",
        metavar="NAME",
        help="a preset, or the folder of a YOCO or LongLLaMA; harness: of any causal model (default: the shape below)",
    )
    add_options(shape, "mem_layers")
    shape.add_argument("--hidden-size", type=int, metavar="D", help="width (512)")
    shape.add_argument("--layers", type=int, metavar="L", help="layers, half of them self-decoder (12)")
    shape.add_argument("--self-decoder", metavar="KIND", help="mixer of the self-decoder (gated_retention)")
    shape.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="any other key of YocoConfig"
    )
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--lengths", metavar="N,N", help=f"tokens, such as 4096,16K ({DEFAULT_LENGTHS}; train: {LENGTHS['train']})"
    )
    run.add_argument("--batch-size", type=int, metavar="N", help="sequences side by side (1)")
    run.add_argument("--dtype", help="float32 (default on a CPU), bfloat16 (on a GPU) or float16")
    run.add_argument(
        "--kv-dtype",
        metavar="DTYPE",
        help="YOCO's global cache, a LongLLaMA's memory: auto (--dtype), bfloat16, int8 or, YOCO alone, float8",
    )
    add_options(run, "device")
    run.add_argument("--repeats", type=int, default=3, metavar="N", help="timed calls; their median counts (3)")
    run.add_argument("--prefill-chunk-size", type=int, metavar="N", help="tokens YOCO's prefill reads at a time")
    run.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="use torch.compile, for Llama too (on a GPU yes, but for decode; on a CPU no)",
    )
    run.add_argument(
        "--quantization", metavar="NAME", help="float8: YOCO's prefill multiplies in float8 (H100 or later)"
    )
    run.add_argument("--no-peer", action="store_true", help="leave out Llama")
    run.add_argument("--peer-max-length", type=int, metavar="N", help=f"no Llama beyond this ({PEER_MAX_LENGTH})")
    run.add_argument("--profile", action="store_true", help="also keep the milliseconds of each kernel (with --out)")
    run.add_argument("--op", action="append", metavar="NAME", help="for ops: measure this one; may be repeated (all)")
    run.add_argument(
        "--out", "--output", metavar="FILE", help="append every measurement to this file, as a line of JSON"
    )
    asked = parser.add_argument_group("harness and needle")
    add_options(asked, "tokenizer")
    asked.add_argument("--data", metavar="DIR", help="harness: folder of questions (recipes/eval_data.py harness)")
    asked.add_argument("--tasks", metavar="A,B", help="harness: folders in it (arc_challenge,hellaswag)")
    asked.add_argument("--questions", type=int, metavar="N", help="harness: of each task (8)")
    asked.add_argument("--fewshot", type=int, metavar="N", help="harness: examples before each question (5)")
    asked.add_argument("--hflm-batch-size", type=int, metavar="N", help="harness: requests HFLM scores at once (16)")
    asked.add_argument("--depths", type=int, metavar="N", help="needle: depths of the grid (11)")
    asked.add_argument("--runs", type=int, metavar="N", help="needle: runs at each depth (10)")
    asked.add_argument("--strict", action="store_true", default=None, help="needle: no haystack text twice")


def run(args: argparse.Namespace) -> int:
    from oncelm import bench
    from oncelm.utils.device import resolve_device, resolve_dtype
    from oncelm.utils.errors import check_choice

    if args.benchmark == "serve":
        raise ValueError("serve comes before its options: oncelm bench serve ...")
    check_choice("benchmark", args.benchmark, (*BENCHMARKS, "serve"))
    check_options(args)
    lengths = token_counts(args.lengths or LENGTHS.get(args.benchmark, DEFAULT_LENGTHS))
    device = resolve_device(args.device)
    dtype = resolve_dtype(args.dtype or ("float32" if device.type == "cpu" else "bfloat16"))
    if args.out:
        check_place(args.out, "--out")  # now, not after minutes
        Path(args.out).open("a").close()
    run_options: dict[str, Any] = {"dtype": dtype, "repeats": args.repeats}
    if args.out:
        run_options["on_record"] = lambda record: bench.append_record(args.out, record)
    try:
        if args.benchmark == "ops":
            records = bench.run_ops(args.op, device=device, **run_options)
        elif args.benchmark == "harness":
            records = run_harness(args, device, dtype, run_options)
        elif args.benchmark == "needle":
            records = run_needle(args, device, dtype, lengths, run_options)
        else:
            records = bench.run(
                args.benchmark,
                make_targets(args, device, dtype),
                lengths,
                batch_size=1 if args.batch_size is None else args.batch_size,
                peer_max_length=PEER_MAX_LENGTH if args.peer_max_length is None else args.peer_max_length,
                profile=args.profile,
                **run_options,
            )
    except bench.GateError as error:
        print(f"oncelm: correctness gate: {error}", file=sys.stderr)
        return 1
    tables = {"ops": bench.ops_table, "harness": bench.harness_table, "needle": bench.needle_table}
    print_tables(tables.get(args.benchmark, bench.table)(records))
    if args.out:
        print(f"Appended {len(records)} lines to {args.out}")
    return 0


def check_options(args: argparse.Namespace) -> None:
    """ValueError for an option that would be ignored, or whose value makes no sense."""
    from oncelm.utils import constraints as allowed

    counts = (
        *("hidden_size", "layers", "batch_size", "repeats", "prefill_chunk_size", "peer_max_length"),
        *("questions", "hflm_batch_size", "depths", "runs"),
    )
    allowed.check_options(args, {**dict.fromkeys(counts, allowed.Whole(1, 2**31)), "fewshot": allowed.Whole(0, 1000)})
    for name, benchmarks in GOES_WITH.items():
        if args.benchmark not in benchmarks and getattr(args, name) not in (None, False, []):
            what = "ops, which has no model" if args.benchmark == "ops" else args.benchmark
            raise ValueError(f"--{name.replace('_', '-')} does not go with `oncelm bench {what}`.")


def run_harness(
    args: argparse.Namespace, device: torch.device, dtype: torch.dtype, run_options: dict[str, Any]
) -> list[dict[str, Any]]:
    from oncelm import bench
    from oncelm.eval.harness.suite import split_names

    if args.data is None:
        raise ValueError("harness needs a folder of questions: --data DIR; recipes/eval_data.py harness builds one.")
    given = {"questions": args.questions, "fewshot": args.fewshot, "batch_size": args.hflm_batch_size}
    options = {name: value for name, value in given.items() if value is not None}
    tasks = split_names(args.tasks or "") or bench.HARNESS_TASKS
    model = make_language_model(args, device, dtype)
    return bench.run_harness(model, args.data, tasks, **options, **run_options)


def run_needle(
    args: argparse.Namespace,
    device: torch.device,
    dtype: torch.dtype,
    lengths: list[int],
    run_options: dict[str, Any],
) -> list[dict[str, Any]]:
    from oncelm import bench

    model = make_language_model(args, device, dtype)
    given = {"depths": args.depths, "runs": args.runs, "strict": args.strict}
    options = {name: value for name, value in given.items() if value is not None}
    target = make_target(args, model.model)
    return bench.run_needle(target, model, lengths, **options, **run_options)


def make_language_model(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """The model of the command line with its tokenizer, of as many tokens as that knows."""
    from oncelm.eval import LanguageModel

    is_folder = args.model is not None and Path(args.model).is_dir()
    if args.tokenizer is None and not is_folder:
        raise ValueError("a model without a folder has no tokenizer; name one, such as --tokenizer cl100k_base.")
    tokenizer = find_tokenizer(args.model or "", args.tokenizer)
    model = make_model(args, device, dtype, **({} if is_folder else {"vocab_size": len(tokenizer)}))
    return LanguageModel(model, tokenizer, (args.model and Path(args.model).name) or "default shape")


def make_targets(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list[Target]:
    """The model of the command line and, unless --no-peer, its Llama."""
    import torch

    from oncelm import bench
    from oncelm.models.resolve import fresh

    kept = torch.float32 if args.benchmark == "train" else dtype  # training computes in dtype, on float32 weights
    model = make_model(args, device, kept)
    own = make_target(args, model)
    if args.no_peer:
        return [own]
    form = "model" if args.benchmark == "train" else "norms and feed-forward layers"
    peer = fresh(bench.llama_config(model.config), device, kept).eval()
    return [own, bench.PeerTarget(peer, compile=form if own.compiled else "")]


def make_target(args: argparse.Namespace, model: Any) -> OwnTarget:
    """The model with the command line's ways to run it; ValueError for options that its family does not take."""
    from oncelm import bench

    if args.prefill_chunk_size is not None and model.reads_by_windows:
        raise ValueError(f"--prefill-chunk-size is not for {model.title} models: they read window by window.")
    options = {
        "compile": compiles(args, model.device),
        "quantization": args.quantization,
        "kv_dtype": kv_dtype(model.config, args),
    }
    return bench.OwnTarget(model, args.prefill_chunk_size, **options)


def compiles(args: argparse.Namespace, device: torch.device) -> bool:
    """--compile, or what pays off."""
    return device.type == "cuda" and args.benchmark != "decode" if args.compile is None else args.compile


def make_model(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, **changes: Any) -> Any:
    """The folder's, or one with random weights: the preset or the default shape, with the command line's changes."""
    import torch

    from oncelm.models import load
    from oncelm.models.registry import adoption, family, titles
    from oncelm.models.resolve import fresh

    torch.manual_seed(0)
    if args.model is None or not Path(args.model).is_dir():
        model = fresh(make_config(args, **changes), device, dtype).eval()
    else:
        refuse_shape_options(args, but=())
        model = load(args.model, device, dtype, **model_keys(args))

    def is_measured(able: type[Family]) -> bool:
        return able.has_own_cache and (not able.reads_by_windows or args.benchmark in GOES_WITH["mem_layers"])

    if not is_measured(family(model.config)) and args.benchmark != "harness":
        hint = adoption(model.config.model_type) if args.benchmark in GOES_WITH["mem_layers"] else ""
        raise ValueError(
            f"model {args.model!r} is a {type(model).__name__}; `oncelm bench {args.benchmark}` measures "
            f"{titles(is_measured)} models (harness any causal model).{hint}"
        )
    return model


def make_config(args: argparse.Namespace, **changes: Any) -> PreTrainedConfig:
    """The preset or the default shape, with `changes` and then the command line's."""
    from oncelm.models import describe
    from oncelm.models.registry import presets
    from oncelm.models.yoco.presets import sized_config
    from oncelm.utils.errors import check_choice

    changes |= parse_settings(args.set) | model_keys(args)
    if args.self_decoder is not None:
        changes["self_decoder"] = args.self_decoder
    if args.model is not None:
        refuse_shape_options(args, but=("self_decoder", "set"))
        check_choice("preset", args.model, presets())
        return describe(args.model, **changes)
    sizes = {"hidden_size": args.hidden_size, "num_layers": args.layers}
    return sized_config(**{name: value for name, value in sizes.items() if value is not None}, **changes)


def refuse_shape_options(args: argparse.Namespace, but: tuple[str, ...]) -> None:
    """A model that is named has its shape: ValueError for options that would be ignored."""
    for name in ("hidden_size", "layers", "self_decoder", "set"):
        if name not in but and getattr(args, name):
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option} does not go with --model {args.model}, which fixes it; leave one of them out.")
