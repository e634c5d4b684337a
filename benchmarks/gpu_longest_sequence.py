"""The longest sequence that a model trains on in one GPU's memory: a YOCO, and the Llama of the same shape.

    python benchmarks/gpu_longest_sequence.py --out results.jsonl
    python benchmarks/gpu_longest_sequence.py --out results.jsonl --checkpointing --memory 80   in 80 GB of a larger one

A step is what `oncelm train` does with one sequence: forward, backward, clipping, AdamW; weights float32, computation
bfloat16, compiled. Lengths double until memory is full or a step would outlast --seconds. Memory grows linearly with
the length, so two lengths tell where it ends; the last step is at 97 % of that length, if the time allows.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from oncelm import bench
from oncelm.bench.measure import PeakMemory, measure
from oncelm.models.yoco.presets import preset_config
from oncelm.train.config import TrainConfig
from oncelm.train.optimizer import build_optimizers
from oncelm.train.parallel.ranks import Ranks
from oncelm.train.trainer import prepare_model
from oncelm.utils.environment import environment_report

WARM_UP = (1024, 2048)  # tokens: the first length compiles for itself, the second for all others
MULTIPLE = 1024  # tokens: lengths are rounded down to it
MARGIN = 0.97  # of the predicted longest length: an allocator cannot use the last pieces


def one_step(model: PreTrainedModel, optimizers: list[torch.optim.Optimizer], length: int) -> tuple[float, int]:
    """(seconds, peak bytes, weights and optimizer included) of a training step on one sequence, compiled before."""
    device = model.device
    generator = torch.Generator(device).manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), device=device, generator=generator)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    before = torch.cuda.memory_allocated(device)
    with PeakMemory(device) as peak:
        seconds = measure(step, 1, device, long_run=5.0).median
    return seconds, before + peak.bytes


def search(
    model: PreTrainedModel, config: TrainConfig, start: int, longest_step: float, limit: int
) -> Iterator[dict[str, Any]]:
    """A line for each length as it is tried, `length`, `seconds` and `peak_bytes` or `error`; then where memory ends.

    PyTorch may allocate `limit` bytes.
    """
    optimizers = build_optimizers(model, config)
    for length in WARM_UP:
        one_step(model, optimizers, length)
    room = min(limit, torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())

    def attempt(length: int) -> dict[str, Any]:
        try:
            seconds, peak = one_step(model, optimizers, length)
            return {"length": length, "seconds": seconds, "peak_bytes": peak}
        except torch.OutOfMemoryError:
            return {"length": length, "error": "out of memory"}
        finally:
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            gc.collect()
            torch.cuda.empty_cache()

    fits: list[dict[str, Any]] = []
    length = start
    while True:
        yield (line := attempt(length))
        if "error" in line:
            break
        fits.append(line)
        if 4 * line["seconds"] > longest_step:  # attention is quadratic
            break
        length *= 2
    if len(fits) < 2:
        return
    before, last = fits[-2:]
    slope = (last["peak_bytes"] - before["peak_bytes"]) / (last["length"] - before["length"])
    end = last["length"] + (room - last["peak_bytes"]) / slope
    predicted = int(MARGIN * end) // MULTIPLE * MULTIPLE
    yield {"length": predicted, "predicted": True, "bytes_per_token": slope, "room": room}
    if predicted > last["length"] and last["seconds"] * (predicted / last["length"]) ** 2 <= longest_step:
        yield attempt(predicted)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="yoco-160m")
    parser.add_argument("--checkpointing", action="store_true", help="compute layers again in the backward pass")
    parser.add_argument("--start", type=int, default=16384, metavar="N", help="the first length (16384)")
    parser.add_argument("--seconds", type=float, default=40.0, help="no step that would take longer than this (40)")
    parser.add_argument("--memory", type=float, metavar="GB", help="for the model and its training (all that is free)")
    args = parser.parse_args()
    whole = torch.cuda.get_device_properties(0).total_memory
    limit = min(whole, int(args.memory * 1e9)) if args.memory else whole
    torch.cuda.set_per_process_memory_fraction(limit / whole)
    yoco, environment = preset_config(args.model), environment_report()
    settings = TrainConfig(data="", out="", dtype="bfloat16", compile=True, activation_checkpointing=args.checkpointing)
    for name, shape in (("YOCO", yoco), ("Llama", bench.llama_config(yoco))):
        torch.manual_seed(0)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
        model = prepare_model(model.train(), settings, Ranks(torch.device("cuda")))
        for line in search(model, settings, args.start, args.seconds, limit):
            record = {"benchmark": "longest sequence", "subject": name, "model": args.model, **line}
            record |= {"checkpointing": args.checkpointing, "time": datetime.now(UTC).isoformat(timespec="seconds")}
            bench.append_record(args.out, {**record, "environment": environment})
            print(record, flush=True)
        del model
        torch.compiler.reset()
        gc.collect()


if __name__ == "__main__":
    main()
