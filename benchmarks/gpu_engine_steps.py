"""What the engine's forward passes cost beside the bare model's: decode steps, host time, prefill. 3B, random weights.

    PYTHONPATH=src python3 benchmarks/gpu_engine_steps.py --out steps.jsonl [--small]

First a gate: logits of the engine beside those of `model.prefill` and `model.step` on the same tokens. Then one line of
JSON a measurement. `--small` runs all of it with a tiny model, on a CPU too, in seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from oncelm.bench.measure import seconds_of
from oncelm.engine.pool import Pool
from oncelm.engine.runner import Runner
from oncelm.engine.work import Piece, Row
from oncelm.models import YocoForCausalLM, build_model
from oncelm.ops.quantize import LARGEST
from oncelm.utils.environment import environment_report

GATE = 0.03  # largest relative error of bf16 logits, as of two orders of summation in 26 layers
STEPS, TURNS = 20, 3


class Sequences:
    """N sequences behind `length` tokens that nobody has read: pages in any order, states and K/V of noise."""

    def __init__(self, model: YocoForCausalLM, count: int, length: int, kv_dtype: torch.dtype | None, page_size: int):
        self.length = length
        pages = -(-(length + 8 * STEPS * TURNS) // page_size)
        self.pool = Pool(model, count * pages + 1, page_size, count + 1, kv_dtype)
        self.runner = Runner(model, self.pool, max_num_seqs=count, max_pages=pages)
        order = random.Random(0).sample(range(1, count * pages + 1), count * pages)
        self.pages = [order[n * pages : (n + 1) * pages] for n in range(count)]
        for store in self.pool.stores.values():
            for part in store.tensor_names:
                fill(getattr(store, part))

    def rows(self, tokens: list[list[int]], start: int, kept: int = 1) -> list[Row]:
        return [Row(n + 1, self.pages[n], start, own, kept) for n, own in enumerate(tokens)]


def fill(x: torch.Tensor) -> None:
    """Noise: what is all zeros takes less power, and so less time."""
    for part in x.split(max(1, len(x) // 16)):
        if x.dtype in LARGEST:
            part.copy_((torch.randn(part.shape, device=x.device) * LARGEST[x.dtype] / 6).to(x.dtype))
        else:
            part.normal_(std=0.01 if x.dim() == 3 else 1.0)


def gate(model: YocoForCausalLM, lengths: list[int], kv_dtype: torch.dtype | None, page_size: int) -> float:
    """The largest relative error of the engine's logits; RuntimeError if it is too large."""
    device, steps = model.device, 6
    ids = [torch.randint(5, model.config.vocab_size, (1, length + steps), device=device) for length in lengths]
    pages = -(-(max(lengths) + steps) // page_size)
    pool = Pool(model, len(lengths) * pages + 1, page_size, len(lengths) + 1, kv_dtype)
    runner = Runner(model, pool, max_num_seqs=len(lengths), max_pages=pages)
    order = random.Random(1).sample(range(1, len(lengths) * pages + 1), len(lengths) * pages)
    own = [order[n * pages : (n + 1) * pages] for n in range(len(lengths))]
    texts = [row[0].tolist() for row in ids]
    half = [length // 2 for length in lengths]
    runner.prefill([Piece(n + 1, own[n], 0, texts[n][: half[n]]) for n in range(len(lengths)) if half[n]])
    runner.prefill([Piece(n + 1, own[n], half[n], texts[n][half[n] : length]) for n, length in enumerate(lengths)])
    found = [
        runner.decode([Row(n + 1, own[n], length + t, [texts[n][length + t]]) for n, length in enumerate(lengths)])
        for t in range(steps)
    ]
    worst = 0.0
    for n, length in enumerate(lengths):
        cache = model.new_cache(1, length + steps, dtype=kv_dtype)
        model.prefill(ids[n][:, :length], cache)
        for t in range(steps):
            expected = model.step(ids[n][:, length + t : length + t + 1], cache)[0].float()
            worst = max(worst, ((found[t][n].float() - expected).norm() / expected.norm()).item())
    if not worst < GATE:
        raise RuntimeError(f"the engine's logits differ by {worst:.3g} from the model's.")
    return worst


def bare_steps(model: YocoForCausalLM, count: int, length: int, kv_dtype: torch.dtype | None) -> list[float]:
    """Seconds of a step of `model.step` whose likeliest tokens the host reads."""
    cache = model.new_cache(count, length + STEPS * TURNS + 8, dtype=kv_dtype)
    for tensor in cache.tensors().values():
        fill(tensor)
    cache.lengths, cache.columns = (length,) * count, length
    tokens = torch.full((count, 1), 7, device=model.device)

    def steps(number: int) -> None:
        nonlocal tokens
        for _ in range(number):
            tokens = model.step(tokens, cache).argmax(-1, keepdim=True)
            tokens.tolist()

    steps(4)
    return [seconds_of(lambda: steps(STEPS), model.device) / STEPS for _ in range(TURNS)]


def engine_steps(held: Sequences, drafts: int = 0) -> dict[str, list[float]]:
    """Seconds of a step of `Runner.decode` whose likeliest tokens the host reads, and of the call before it waits."""
    device, count, start = held.pool.device, len(held.pages), held.length
    tokens = [[7] * (1 + drafts)] * count
    calls: list[float] = []

    def steps(number: int) -> None:
        nonlocal start, tokens
        for _ in range(number):
            rows = held.rows(tokens, start)
            began = time.perf_counter()
            logits = held.runner.decode(rows)
            calls.append(time.perf_counter() - began)
            likeliest = logits.argmax(-1).view(count, -1)[:, :1].tolist()
            tokens = [own * (1 + drafts) for own in likeliest]
            start += 1

    steps(4)
    calls.clear()
    return {"step": [seconds_of(lambda: steps(STEPS), device) / STEPS for _ in range(TURNS)], "call": calls}


def prefill_both(model: YocoForCausalLM, length: int, page_size: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of a prompt by `model.prefill` and by pieces of the same size, in turns."""
    ids = torch.randint(5, model.config.vocab_size, (1, length), device=model.device)
    size, tokens = model.prefill_chunk_size(1), ids[0].tolist()
    pages = -(-length // page_size)
    pool = Pool(model, pages + 1, page_size, 2)
    runner = Runner(model, pool, max_num_seqs=1, max_pages=pages)
    order = random.Random(2).sample(range(1, pages + 1), pages)
    cache = model.new_cache(1, length)

    def bare() -> None:
        cache.reset()
        model.prefill(ids, cache, chunk_size=size)

    def pieces() -> None:
        for start in range(0, length, size):
            runner.prefill([Piece(1, order, start, tokens[start : start + size])])

    found: dict[str, list[float]] = {"model": [], "engine": []}
    for turn in range(repeats + 1):
        for name, run in (("model", bare), ("engine", pieces)):
            took = seconds_of(run, model.device)
            if turn:
                found[name].append(took)
    return found


def packed_prefill(model: YocoForCausalLM, count: int, length: int, page_size: int, repeats: int) -> list[float]:
    """Seconds of `count` pieces of `length` tokens in one pass."""
    pages = -(-length // page_size)
    pool = Pool(model, count * pages + 1, page_size, count + 1)
    runner = Runner(model, pool, max_num_seqs=count, max_pages=pages)
    tokens = torch.randint(5, model.config.vocab_size, (count, length)).tolist()
    pieces = [Piece(n + 1, list(range(n * pages + 1, (n + 1) * pages + 1)), 0, own) for n, own in enumerate(tokens)]
    return [seconds_of(lambda: runner.prefill(pieces), model.device) for _ in range(repeats + 1)][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    parser.add_argument("--small", action="store_true", help="a tiny model and short texts, on a CPU too")
    parser.add_argument("--page-size", type=int, default=256)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    began, environment = time.perf_counter(), environment_report()

    def write(what: str, **found: Any) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        record = {"what": what, "model": name, **found, "at_seconds": round(time.perf_counter() - began, 1)}
        print(
            {key: round(value, 6) if isinstance(value, float) else value for key, value in record.items()}, flush=True
        )
        with args.out.open("a") as file:
            file.write(json.dumps({**record, "page_size": size, "time": now, "environment": environment}) + "\n")

    name, size = ("yoco-tiny", 16) if args.small else ("yoco-3b", args.page_size)
    torch.manual_seed(0)
    with torch.device(device):
        model = build_model(name).to(torch.bfloat16 if device.type == "cuda" else torch.float32).eval()
    cases = [(1, 64), (3, 128)] if args.small else [(1, 8192), (16, 32768), (64, 8192)]
    dtypes = {"model": None, "float8": torch.float8_e4m3fn}
    write("built")
    with torch.no_grad():
        for kv, dtype in dtypes.items():
            write("gate", kv=kv, error=gate(model, [60, 33, 2] if args.small else [1500, 517, 64, 3], dtype, size))
        for count, length in cases:
            for kv, dtype in dtypes.items():
                bare = bare_steps(model, count, length, dtype)
                held = Sequences(model, count, length, dtype, size)
                found = engine_steps(held)
                write(
                    "decode", rows=count, behind=length, kv=kv,
                    model_ms=1e3 * statistics.median(bare), engine_ms=1e3 * statistics.median(found["step"]),
                    host_ms=1e3 * statistics.median(found["call"]), host_ms_most=1e3 * max(found["call"]),
                )  # fmt: skip
                if count > 1 and dtype is None:
                    drafts = engine_steps(held, drafts=4)
                    write("decode with 4 drafts", rows=count, behind=length, kv=kv,
                          engine_ms=1e3 * statistics.median(drafts["step"]))  # fmt: skip
                del held
        model.compile_layers(device.type == "cuda")
        for length in (256, 512) if args.small else (32768, 131072):
            both = prefill_both(model, length, size, 3 if length < 100_000 else 2)
            write("prefill", tokens=length, chunk=model.prefill_chunk_size(1),
                  **{f"{who}_seconds": statistics.median(runs) for who, runs in both.items()})  # fmt: skip
        count, length = (4, 64) if args.small else (4, 8192)
        write("prefill packed", pieces=count, tokens=length,
              engine_seconds=statistics.median(packed_prefill(model, count, length, size, 3)))  # fmt: skip


if __name__ == "__main__":
    main()
