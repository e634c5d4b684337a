"""The same measurements of two source trees in turn, on one GPU: what a change of the models costs or gains.

    git worktree add /tmp/before HEAD~20
    python benchmarks/gpu_two_trees.py --before /tmp/before/src --after src --out results.jsonl

A process a tree and turn, so that neither warms up for the other. One line of JSON a measurement: milliseconds of a
decode step behind 8K tokens (steps in a row, and each waited for), of a token of `generate`, and of a training step;
seconds of a compiled prefill of 32K. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TURNS, STEPS, PROMPT = 3, 100, 8192


def timed(run: Callable[[], object], count: int) -> list[float]:
    import torch

    found = []
    for _ in range(count):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return found


def measure_inference(write: Callable[..., None]) -> None:
    import torch

    from oncelm.models import build_model

    with torch.device("cuda"):
        model = build_model("yoco-3b").to(torch.bfloat16).eval()
    ids = torch.randint(5, 100_000, (1, 32_768), device="cuda")
    cache = model.new_cache(1, PROMPT + 20 * STEPS)
    with torch.no_grad():
        token = model.prefill(ids[:, :PROMPT], cache).argmax(-1, keepdim=True)

        def step() -> None:
            model(token, past_key_values=cache, logits_to_keep=1)

        def steps() -> None:
            for _ in range(STEPS):
                step()

        steps()
        write(what="decode behind 8K", unit="ms", runs=[1e3 * s / STEPS for s in timed(steps, 5)])
        write(what="decode behind 8K, each step waited for", unit="ms", runs=[1e3 * s for s in timed(step, STEPS)])
    mask = torch.ones_like(ids[:, :PROMPT])

    def generate(count: int) -> None:
        model.generate(
            ids[:, :PROMPT],
            attention_mask=mask,
            max_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=1,
        )

    generate(8)
    start = statistics.median(timed(lambda: generate(8), 5))
    rest = timed(lambda: generate(264), 5)
    write(what="generate, greedy, 8K and 256 tokens", unit="ms", runs=[1e3 * (s - start) / 256 for s in rest])
    model.compile_layers()

    def prefill() -> None:
        model.prefill(ids, model.new_cache(1, ids.shape[1]))

    prefill()
    prefill()
    write(what="prefill of 32K, compiled", unit="s", runs=timed(prefill, 5))


def measure_training(write: Callable[..., None]) -> None:
    import torch

    from oncelm.models import build_model

    with torch.device("cuda"):
        model = build_model("yoco-160m").train().compile_layers()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = torch.randint(5, 100_000, (16, 2048), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(rows, labels=rows, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timed(step, 10)
    write(what="training step, 160M, 16 x 2048, compiled", unit="ms", runs=[1e3 * s for s in timed(step, 60)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="the folder `src` of one tree")
    parser.add_argument("--after", type=Path, help="the folder `src` of the other")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to append to")
    parser.add_argument("--tree", help=argparse.SUPPRESS)  # which of the two this process measures
    args = parser.parse_args()
    if args.tree is None:
        for _ in range(TURNS):
            for tree in ("before", "after"):
                path = os.pathsep.join([str(getattr(args, tree).resolve()), os.environ.get("PYTHONPATH", "")])
                command = [sys.executable, __file__, "--out", str(args.out), "--tree", tree]
                subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=True)
        return

    from oncelm.utils.environment import environment_report

    environment = environment_report()

    def write(what: str, unit: str, runs: list[float]) -> None:
        row: dict[str, Any] = {"tree": args.tree, "what": what, "unit": unit, "median": statistics.median(runs)}
        row |= {"best": min(runs), "runs": len(runs), "environment": environment}
        print(row["tree"], what, f"{row['median']:.4g} {unit}", flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")

    measure_inference(write)
    measure_training(write)


if __name__ == "__main__":
    main()
