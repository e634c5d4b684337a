"""Is a run on several GPUs the run on one, and how fast is it? Seven short runs, then a table and OUT/ranks.jsonl.

    python recipes/many_gpus.py DATA OUT                          on 2 GPUs: about 8 minutes
    python recipes/many_gpus.py DATA OUT --processes 8
    python recipes/many_gpus.py DATA OUT --only one data chunk --set compile=true steps=40     speed

`difference` is the largest of a loss from the run on one process with the same batches, as a share of it: about 1e-3
in bfloat16, below 1e-4 with --set dtype=float32. A run that fails is told with its first error, and the others go on.
Works on a CPU too: --set device=cpu dtype=float32 model=yoco-tiny model_overrides.num_self_heads=4 seq_len=128.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    **{"model": "yoco-160m", "seq_len": 4096, "batch_size": 8, "steps": 20, "warmup_steps": 5, "schedule": "constant"},
    **{"dtype": "bfloat16", "log_every": 1, "eval_every": "null", "eval_batches": 2, "save_every": "null"},
    # what divides among 2 ranks (the preset has 3 heads), whatever the tokenizer makes of the text
    **{"model_overrides.num_self_heads": 6, "model_overrides.vocab_size": 16384, "report": "[]"},
}
WINDOW = ["model_overrides.self_decoder=sliding_window", "model_overrides.window_size=512"]
# name: (what it is compared with, settings); N stands for the number of processes
RUNS: dict[str, tuple[str | None, list[str]]] = {
    "one": (None, []),
    "data": ("one", []),
    "chunk": ("one", ["context_parallel=N"]),
    "tensor": ("one", ["tensor_parallel=N", "compile=false"]),
    "resumed": ("one", []),  # half of it on N processes, the rest on one
    "window-one": (None, WINDOW),
    "window-chunk": ("window-one", [*WINDOW, "context_parallel=N"]),
}


def train(name: str, out: Path, processes: int, settings: list[str], timeout: float) -> None:
    """One run, as a process or more of its own; RuntimeError with its first error if it fails."""
    settings = [setting.replace("=N", f"={processes}") for setting in settings]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), "-m", "oncelm", "train", str(out / "tokens")]
    command += ["--out", str(out / name), "--resume", "--set", *settings]
    log = out / f"{name}.log"
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = process.wait(timeout)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)  # torchrun's workers too
            process.wait()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise RuntimeError(f"not finished in {timeout:g} s") from None
    if status:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line for line in lines if "error" in line.lower()] or lines[-1:]
        raise RuntimeError(f"status {status}: {said[0][:200] if said else 'nothing said'}")


def measure(name: str, out: Path, processes: int) -> dict[str, Any]:
    """A finished run's line of ranks.jsonl."""
    lines = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    late = steps[len(steps) // 2 :]
    record = {"run": name, "processes": processes, "losses": [line["loss"] for line in steps]}
    for value in ("tokens_per_second", "memory_gib", "mfu"):
        if value in late[-1]:
            record[value] = statistics.median(line[value] for line in late)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="text, as oncelm data prepare takes it")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="of each run on many (2)")
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=RUNS, metavar="RUN", help=", ".join(RUNS))
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="replace settings of all runs")
    parser.add_argument("--timeout", type=float, default=300, metavar="S", help="of one run (300)")
    args = parser.parse_args()
    prepare = ["data", "prepare", args.data, "--tokenizer", "bpe:16384", "--out", str(args.out / "tokens")]
    subprocess.run([sys.executable, "-m", "oncelm", *prepare], check=True)
    common = SETTINGS | dict(setting.split("=", 1) for setting in args.set)
    records: dict[str, dict[str, Any]] = {}
    for name in args.only:
        reference, own = RUNS[name]
        settings = [*(f"{key}={value}" for key, value in common.items()), *own]
        processes = 1 if reference is None else args.processes
        try:
            if name == "resumed":
                train(name, args.out, processes, [*settings, f"steps={int(common['steps']) // 2}"], args.timeout)
                processes = 1
            train(name, args.out, processes, settings, args.timeout)
            record = measure(name, args.out, processes)
        except RuntimeError as error:
            print(f"{name:<14}failed ({args.out / name}.log): {error}", flush=True)
            continue
        if reference in records:
            pairs = zip(record["losses"], records[reference]["losses"], strict=True)
            record["difference"] = max(abs(own_loss - other) / other for own_loss, other in pairs)
        records[name] = record
        with (args.out / "ranks.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{name:<14}{processes} processes, loss {record['losses'][0]:.5f} to {record['losses'][-1]:.5f}", end="")
        print(f", difference {record['difference']:.1e}" if "difference" in record else "", end="")
        print(f", {record['tokens_per_second']:,.0f} tokens/s, {record['memory_gib']:.1f} GiB", flush=True)


if __name__ == "__main__":
    main()
