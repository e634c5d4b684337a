"""The longest sequence that a model trains on in one GPU's memory: a YOCO, and the Llama of the same shape.

    python benchmarks/gpu_longest_sequence.py --out results.jsonl
    python benchmarks/gpu_longest_sequence.py --out results.jsonl --checkpointing --memory 80   in 80 GB of a larger one

A step is what `oncelm train` does with one sequence: forward, backward, clipping, AdamW; weights float32, computation
bfloat16, compiled. Lengths double until memory is full, and then halve what is between the longest that fits and the
shortest that does not. Where a step would outlast --seconds first, the last two lengths say where memory would end.
transformers' Llama keeps logits of all tokens; "Llama, chunked loss" is the same model with OnceLM's loss.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from oncelm import bench
from oncelm.bench.measure import PeakMemory, measure
from oncelm.models.resolve import describe
from oncelm.ops import linear_cross_entropy
from oncelm.train.config import TrainConfig
from oncelm.train.optimizer import build_optimizers
from oncelm.train.parallel.mesh import Mesh
from oncelm.train.parallel.shard import prepare_model
from oncelm.utils.environment import environment_report

WARM_UP = (1024, 2048)  # tokens: the first length compiles for itself, the second for all others
CLOSE = 1 / 32  # of the longest length: how near to it the shortest that does not fit must be


def loss(model: PreTrainedModel, ids: torch.Tensor, chunked: bool) -> torch.Tensor:
    """Of ids [1, T]; `chunked`: transformers' model with OnceLM's loss, which keeps no logits [T, V]."""
    if not chunked:
        return model(input_ids=ids, labels=ids, use_cache=False).loss
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]  # [T - 1, d]
    return linear_cross_entropy(hidden, model.lm_head.weight, ids[0, 1:]) / len(hidden)


def one_step(
    model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], length: int, chunked: bool
) -> tuple[float, int]:
    """(seconds, peak bytes, weights and optimizer included) of a training step on one sequence, after another."""
    device = model.device
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), device=device, generator=generator)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss(model, ids, chunked).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    before = torch.cuda.memory_allocated(device)
    with PeakMemory(device) as peak:
        seconds = measure(step, 1, device, long_run=math.inf).median  # a length may be compiled anew
    return seconds, before + peak.bytes


def attempts(
    model: PreTrainedModel, config: TrainConfig, start: int, longest_step: float, chunked: bool
) -> Iterator[dict[str, Any]]:
    """`search` among training steps of the model; no other holds memory of the process."""
    optimizers = build_optimizers(model, config)
    for length in WARM_UP:
        one_step(model, optimizers, length, chunked)

    def attempt(length: int) -> dict[str, Any]:
        try:
            seconds, peak = one_step(model, optimizers, length, chunked)
            return {"length": length, "seconds": seconds, "peak_bytes": peak}
        except torch.OutOfMemoryError as error:
            return {"length": length, "error": str(error).split(" GPU ")[0]}
        finally:
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()

    yield from search(attempt, start, longest_step)


def search(attempt: Callable[[int], dict[str, Any]], start: int, longest_step: float) -> Iterator[dict[str, Any]]:
    """A line for each length as it is tried: `length`, `seconds` and `peak_bytes`, or `error`.

    The last line is `bytes_per_token` between the two longest that fit if time ended the search, not memory.
    """
    fits: list[dict[str, Any]] = []
    too_long, length = None, start
    while too_long is None or not fits or too_long - fits[-1]["length"] > max(1, CLOSE * too_long):
        yield (line := attempt(length))
        if "error" in line:
            too_long = length
        else:
            fits.append(line)
        if not fits:
            length //= 2
            if length < WARM_UP[0]:
                return
            continue
        longest, seconds = fits[-1]["length"], fits[-1]["seconds"]
        length = 2 * longest if too_long is None else (longest + too_long) // 2
        if (length / longest) ** 2 * seconds > longest_step:  # attention is quadratic
            break
    if too_long is None and len(fits) > 1:
        before, last = fits[-2:]
        slope = (last["peak_bytes"] - before["peak_bytes"]) / (last["length"] - before["length"])
        yield {"longest": last["length"], "bytes_per_token": slope}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="yoco-160m")
    parser.add_argument("--checkpointing", action="store_true", help="compute layers again in the backward pass")
    parser.add_argument("--start", type=int, default=16384, metavar="N", help="the first length (16384)")
    parser.add_argument("--seconds", type=float, default=40.0, help="no step that would take longer than this (40)")
    parser.add_argument("--memory", type=float, metavar="GB", help="for the model and its training (all that is free)")
    names = ("YOCO", "Llama", "Llama, chunked loss")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"of {names} (all)")
    args = parser.parse_args()
    whole = torch.cuda.get_device_properties(0).total_memory
    limit = min(whole, int(args.memory * 1e9)) if args.memory else whole
    torch.cuda.set_per_process_memory_fraction(limit / whole)
    yoco, environment = describe(args.model), environment_report()
    settings = TrainConfig(data="", out="", dtype="bfloat16", compile=True, activation_checkpointing=args.checkpointing)
    llama = bench.llama_config(yoco)
    shapes = {"YOCO": yoco, "Llama": llama, "Llama, chunked loss": llama}
    for name in args.only:
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(shapes[name], dtype=torch.float32)
        print(f"{name}: compiling", flush=True)
        model = prepare_model(model.train(), settings, Mesh(torch.device("cuda")))
        if chunked := name == "Llama, chunked loss":
            model.model.compile()
        for line in attempts(model, settings, args.start, args.seconds, chunked):
            record = {"benchmark": "longest sequence", "subject": name, "model": args.model, **line}
            record |= {"checkpointing": args.checkpointing, "time": datetime.now(UTC).isoformat(timespec="seconds")}
            bench.append_record(args.out, {**record, "environment": environment})
            print(record, flush=True)
        del model
        torch.compiler.reset()
        gc.collect()


if __name__ == "__main__":
    main()
