"""Prefill of a whole model on one GPU: plain, compiled and in float8, by chunk and by length.

    python benchmarks/gpu_full_model.py --out results.jsonl --plot prefill.png [--only turns float8 ...]

The forms take turns on the same prompt, because a GPU that has been busy for a second runs its matrix products a tenth
slower than a cool one (power). Each form passes `oncelm.bench`'s gate first. A part that
fails leaves a line and does not cost the others. One line of JSON a measurement.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM
from triton.testing import do_bench

from oncelm import bench
from oncelm.bench.measure import PeakMemory, kernel_times, measure
from oncelm.bench.plot import Panel, plot_by_length
from oncelm.models import YocoConfig, YocoForCausalLM
from oncelm.models.compiling import OPTIONS
from oncelm.models.resolve import describe
from oncelm.ops import rms_norm, swiglu
from oncelm.ops.float8 import Float8Rows, round_rows
from oncelm.utils.environment import environment_report

FLOAT8: dict[str, Any] = {"compile": True, "quantization": "float8"}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "compiled": {"compile": True},
    "float8": FLOAT8,
}
LENGTHS = (8192, 32768, 131072, 524288, 1048576)
CHUNKS = (4096, 8192, 16384, 32768)
PARTS = ("lengths", "memory", "turns", "float8", "rounding", "chunks", "profile", "llama")
TURNS = 3


def make(build: Callable, config: Any) -> Any:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return build(config, dtype=torch.bfloat16).eval()


def draw(model: Any, length: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, length), device="cuda", generator=generator)


def in_turns(model: YocoForCausalLM, length: int, write: Callable) -> None:
    """Seconds of a prefill in one chunk, each form after the other, several times."""
    ids = draw(model, length)
    runs: dict[str, list[float]] = {name: [] for name in FORMS}
    for _ in range(TURNS):
        for name, options in FORMS.items():
            target = bench.OwnTarget(model, length, **options)
            runs[name] += measure(lambda: target.prefill(ids), 3, model.device).runs  # noqa: B023
    for name, found in runs.items():
        write("prefill in turns", form=name, length=length, chunk=length, runs=found)


def rounding(config: YocoConfig, tokens: int, write: Callable) -> None:
    """Milliseconds of each kernel that rounds its result to float8, and of what torch.compile makes of the same."""
    from oncelm.ops import float8_triton as kernels

    def rows(*width: int) -> torch.Tensor:
        return torch.randn(1, tokens, *width, device="cuda", dtype=torch.bfloat16)

    d, f, eps = config.hidden_size, config.intermediate_size, config.rms_norm_eps
    weight = torch.randn(d, device="cuda", dtype=torch.bfloat16)

    def norm(x: torch.Tensor) -> tuple[torch.Tensor, Float8Rows]:
        normed = rms_norm(x, weight, eps)
        return normed, round_rows(normed)

    def add_norm(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, Float8Rows]:
        return x + y, round_rows(rms_norm(x + y, weight, eps))

    def gate_heads(o: torch.Tensor, gate: torch.Tensor) -> Float8Rows:
        return round_rows(swiglu(gate, rms_norm(o, None, eps).flatten(2)))

    heads = rows(config.num_self_heads, config.self_head_dim)
    cases: dict[str, tuple[Callable, Callable, tuple[torch.Tensor, ...]]] = {
        "norm": (norm, lambda x: kernels.norm_rows(x, weight, eps), (rows(d),)),
        "sum and norm": (add_norm, lambda x, y: kernels.add_norm_rows(x, y, weight, eps), (rows(d), rows(d))),
        "SwiGLU": (lambda x, gate: round_rows(swiglu(x, gate)), kernels.swiglu_rows, (rows(f), rows(f))),
        "gated heads": (gate_heads, lambda o, gate: kernels.gate_heads_rows(o, gate, eps), (heads, rows(d))),
    }
    for name, (plain, kernel, inputs) in cases.items():
        forms = {"compiled": torch.compile(plain, options=OPTIONS), "kernel": kernel}
        flat = {form: tree_leaves(run(*inputs)) for form, run in forms.items()}
        values, scales = flat["kernel"][-2:]
        expected = flat["compiled"][-2].float() * flat["compiled"][-1]
        error = ((values.float() * scales - expected).norm() / expected.norm()).item()
        if not error < 0.03:  # where the last bit before rounding differs, an element takes the next float8 number
            raise RuntimeError(f"{name}: the kernel differs from plain PyTorch by {error:.3g}.")
        nbytes = sum(x.nbytes for x in (*inputs, *flat["kernel"]))
        del flat, values, scales, expected
        for form, run in forms.items():
            milliseconds = do_bench(lambda: run(*inputs), return_mode="median")  # noqa: B023
            rate = nbytes / milliseconds / 1e9
            write("rounding", op=name, form=form, tokens=tokens, milliseconds=milliseconds, tb_per_s=rate, error=error)


def by_chunk(model: YocoForCausalLM, length: int, write: Callable) -> None:
    """Seconds and memory of a longer prefill, compiled, in chunks of several sizes."""
    ids = draw(model, length)
    for chunk in CHUNKS:
        target = bench.OwnTarget(model, chunk, compile=True)
        cache_bytes = target.prefill(ids)[1].nbytes()
        with PeakMemory(model.device) as peak:
            timing = measure(lambda: target.prefill(ids), 2, model.device)  # noqa: B023
        extra = {"peak_bytes_above_weights_and_cache": peak.bytes - cache_bytes}
        write("prefill by chunk", form="compiled", length=length, chunk=chunk, runs=list(timing.runs), **extra)


def profile(model: YocoForCausalLM, name: str, options: dict[str, Any], length: int, write: Callable) -> None:
    """Milliseconds of each kernel in one chunk."""
    ids, target = draw(model, length), bench.OwnTarget(model, length, **options)
    target.prefill(ids)
    write("profile", form=name, length=length, chunk=length, **kernel_times(lambda: target.prefill(ids), model.device))


def by_length(target: bench.Target, lengths: list[int], out: Path, benchmark: str = "prefill") -> list[dict]:
    """`oncelm bench`'s own records."""

    def keep(record: dict[str, Any]) -> None:
        bench.append_record(out, record)

    return bench.run(benchmark, [target], lengths, dtype=torch.bfloat16, repeats=2, on_record=keep)


def beside_llama(config: YocoConfig, lengths: list[int], out: Path) -> list[dict]:
    llama = make(AutoModelForCausalLM.from_config, bench.llama_config(config))
    return by_length(bench.PeerTarget(llama, compile="norms and feed-forward layers"), lengths, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to append to")
    parser.add_argument("--plot", type=Path, help="PNG of prefill by length")
    parser.add_argument("--model", default="yoco-3b", help="a preset (default: %(default)s)")
    parser.add_argument("--longest", type=int, default=1 << 20, help="tokens (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run (default: all)")
    args = parser.parse_args()
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib")
    if args.longest < LENGTHS[0]:
        parser.error(f"--longest must be at least {LENGTHS[0]}, got {args.longest}")
    config, environment = describe(args.model), environment_report()
    model = make(AutoModelForCausalLM.from_config, config)
    lengths = [length for length in LENGTHS if length <= args.longest]
    chunk = max(length for length in LENGTHS[:2] if length <= args.longest)
    rows: list[dict] = []

    def write(benchmark: str, **figures: Any) -> None:
        record = {"benchmark": benchmark, "model": args.model, "dtype": "bfloat16", **figures}
        time = datetime.now(UTC).isoformat(timespec="seconds")
        bench.append_record(args.out, {**record, "time": time, "environment": environment})
        print(record, flush=True)

    parts: dict[str, Callable[[], object]] = {
        "lengths": lambda: rows.extend(by_length(bench.OwnTarget(model, compile=True), lengths, args.out)),
        "memory": lambda: by_length(bench.OwnTarget(model, 8192, compile=True), lengths[-1:], args.out, "memory"),
        "turns": lambda: in_turns(model, chunk, write),
        "float8": lambda: by_length(
            bench.OwnTarget(model, **FLOAT8), [n for n in lengths[1:] if n <= 524288], args.out
        ),
        "rounding": lambda: rounding(config, chunk, write),
        "chunks": lambda: by_chunk(model, min(131072, lengths[-1]), write),
        "profile": lambda: [profile(model, name, FORMS[name], chunk, write) for name in ("compiled", "float8")],
        "llama": lambda: rows.extend(beside_llama(config, [n for n in lengths if n <= 131072], args.out)),
    }
    assert tuple(parts) == PARTS
    failed = []
    for name in (name for name in PARTS if name in args.only):
        if name == "llama":
            del model  # its memory
        try:
            parts[name]()
        except Exception as error:  # one part must not cost the others
            traceback.print_exc()
            failed.append(name)
            write("failure", part=name, failure=f"{type(error).__name__}: {error}"[:500])
    if args.plot and rows:
        panels = (
            Panel("seconds", "prefill, seconds"),
            Panel("peak_bytes_above_weights", "peak memory above the weights, GiB", 2**-30),
        )
        named = [{**row, "model": row["target"]} for row in rows if "error" not in row]
        plot_by_length(named, args.plot, f"prefill of {args.model}, bfloat16", panels)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
