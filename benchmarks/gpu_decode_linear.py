"""The fused linear kernels of decoding (ops.decode_linear) on one GPU: gates, sweep, times beside cuBLAS.

    PYTHONPATH=src python3 benchmarks/gpu_decode_linear.py --out results [--rows 1 2 4 8 16] [--sweep]

Shapes are those of the 3B model. Times are medians of replays of a CUDA graph that runs the kernel with the weights of
13 layers in turn, so that no weight is in the cache, and include what lies between two kernels. "Layers" is a decode
step without attention: 13 self and 13 cross layers, the shared K/V and the output head.
Everything is appended to results.jsonl as it comes.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from oncelm.bench.roofline import measure_ceilings
from oncelm.ops import (
    apply_rope,
    decode_linear,
    gated_retention_step,
    rms_norm,
    rope_frequencies,
    rope_rotation,
    swiglu,
)
from oncelm.ops.decode_linear import linear_add, norm_linears, norm_swiglu
from oncelm.utils.environment import environment_report

D, FFN, HEADS, HEAD, KV, VOCAB, LAYERS = 3072, 8192, 24, 128, 1024, 100288, 13
EPS = 1e-5
DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
QKVG = ["rope", "rope", "plain", "plain", "decay"]
FORMS = {  # tried by --sweep, by padded rows
    1: [(n, k, s, w) for n, k, s, w in itertools.product((2, 4, 8), (512, 1024), (1, 3), (4, 8)) if n * k <= 4096],
    2: [(n, k, s, w) for n, k, s, w in itertools.product((2, 4, 8), (256, 512, 1024), (1, 3), (4, 8)) if n * k <= 4096],
    4: [(n, k, s, w) for n, k, s, w in itertools.product((2, 4), (256, 512), (1, 3), (4, 8))],
    16: [(16, 128, 5, 2), (16, 256, 4, 2), (32, 256, 3, 4), (32, 128, 4, 4), (16, 128, 5, 1), (32, 128, 5, 2)],
}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE) * 0.02


class Weights:
    """Of one layer of each kind."""

    def __init__(self) -> None:
        self.norm = normal(D) + 1
        self.qkvg = [normal(D, D) for _ in range(4)] + [normal(HEADS, D)]
        self.out, self.fc1, self.gate, self.fc2 = normal(D, D), normal(FFN, D), normal(FFN, D), normal(D, FFN)


def replay_ms(run: Callable[[], Any], repeats: int = 20) -> float:
    """Median milliseconds of a CUDA graph of run()."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(), run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times[3:])[repeats // 2]


def rotation(rows: int) -> torch.Tensor:
    return rope_rotation(torch.arange(99, 99 + rows, device=DEVICE), rope_frequencies(HEAD, 1e4, "inclusive", DEVICE))


def gate(rows: int, w: Weights) -> float:
    """Largest error of the three functions against float64, over twice that of plain PyTorch in bfloat16."""
    x, gates, turn = normal(rows, D) * 50, normal(rows, D) * 50, rotation(rows)

    def plain(dtype: torch.dtype) -> list[torch.Tensor]:
        inputs, norm = x.to(dtype), w.norm.to(dtype)
        h = rms_norm(inputs, norm, EPS)
        q, k, v, g, decay = (F.linear(h, weight.to(dtype)) for weight in w.qkvg)
        q, k = (
            apply_rope(y.unflatten(-1, (HEADS, HEAD))[None], turn[None], "interleaved")[0].flatten(1) for y in (q, k)
        )
        heads = rms_norm(inputs.unflatten(-1, (HEADS, HEAD)), None, EPS).flatten(1)
        with torch.no_grad():
            z = F.silu(gates.to(dtype)) * heads
        fed = swiglu(F.linear(h, w.fc1.to(dtype)), F.linear(h, w.gate.to(dtype)))
        decay = F.logsigmoid(decay.to(torch.promote_types(dtype, torch.float32))) / 16
        return [q, k, v, g, decay, inputs + F.linear(z, w.out.to(dtype)), fed]

    found = norm_linears(x, w.norm, EPS, w.qkvg, QKVG, rotation=turn, decay_scale=1 / 16)
    found += [linear_add(x, w.out, x, gate=gates, head_dim=HEAD, eps=EPS), norm_swiglu(x, w.norm, EPS, w.fc1, w.gate)]

    def error(y: torch.Tensor, exact: torch.Tensor) -> float:
        return ((y.double() - exact).norm() / exact.norm()).item()

    with torch.no_grad():
        exact, bf16 = plain(torch.float64), plain(DTYPE)
    return max(error(y, e) / (2 * error(p, e)) for y, p, e in zip(found, bf16, exact, strict=True))


def cases(rows: int, layers: list[Weights], head: torch.Tensor) -> dict[str, tuple]:
    """name -> (kernel, run ours, run cuBLAS, bytes of weights a call, calls a run)."""
    x, gates, fed, turn = normal(rows, D), normal(rows, D), normal(rows, FFN), rotation(rows)
    return {
        "norm, q k v g decay": (
            "norm_linears",
            lambda: [norm_linears(x, w.norm, EPS, w.qkvg, QKVG, rotation=turn, decay_scale=1 / 16) for w in layers],
            lambda: [[F.linear(x, weight) for weight in w.qkvg] for w in layers],
            2 * (4 * D + HEADS) * D, LAYERS,
        ),
        "norm, q": (
            "norm_linears",
            lambda: [norm_linears(x, w.norm, EPS, w.qkvg[:1], QKVG[:1], rotation=turn) for w in layers],
            lambda: [F.linear(x, w.qkvg[0]) for w in layers],
            2 * D * D, LAYERS,
        ),
        "head norm, gate, out": (
            "linear_add",
            lambda: [linear_add(x, w.out, x, gate=gates, head_dim=HEAD, eps=EPS) for w in layers],
            lambda: [F.linear(x, w.out) for w in layers],
            2 * D * D, LAYERS,
        ),
        "fc2": (
            "linear_add_long" if rows == 1 else "linear_add",
            lambda: [linear_add(fed, w.fc2, x) for w in layers],
            lambda: [F.linear(fed, w.fc2) for w in layers],
            2 * D * FFN, LAYERS,
        ),
        "norm, swiglu": (
            "norm_swiglu",
            lambda: [norm_swiglu(x, w.norm, EPS, w.fc1, w.gate) for w in layers],
            lambda: [(F.linear(x, w.fc1), F.linear(x, w.gate)) for w in layers],
            4 * D * FFN, LAYERS,
        ),
        "norm, head": (
            "norm_linears",
            lambda: norm_linears(x, layers[0].norm, EPS, [head], ["plain"]),
            lambda: F.linear(x, head),
            2 * D * VOCAB, 1,
        ),
    }  # fmt: skip


def all_layers(rows: int, layers: list[Weights], head: torch.Tensor) -> tuple[Callable[[], Any], int]:
    """A decode step without attention, and the bytes of its weights. Self and cross layers share these weights."""
    start, turn = normal(rows, D), rotation(rows)
    states = torch.zeros(LAYERS, rows, HEADS, HEAD, HEAD, device=DEVICE)
    kv = [normal(KV, D), normal(KV, D)]

    def feed_forward(w: Weights, x: torch.Tensor) -> torch.Tensor:
        return linear_add(norm_swiglu(x, w.norm, EPS, w.fc1, w.gate), w.fc2, x)

    def run() -> None:
        x = start
        for w, state in zip(layers, states, strict=True):
            q, k, v, g, decay = norm_linears(x, w.norm, EPS, w.qkvg, QKVG, rotation=turn, decay_scale=1 / 16)
            heads = (y.view(rows, 1, HEADS, HEAD) for y in (q, k, v))
            o = gated_retention_step(*heads, decay.view(rows, 1, HEADS), state)
            x = linear_add(o.view(rows, D), w.out, x, gate=g, head_dim=HEAD, eps=EPS)
            x = feed_forward(w, x)
        norm_linears(x, w.norm, EPS, kv, ["rope", "plain"], rotation=turn)
        for w in layers:
            (q,) = norm_linears(x, w.norm, EPS, w.qkvg[:1], ["rope"], rotation=turn)
            x = feed_forward(w, linear_add(q, w.out, x))
        norm_linears(x, w.norm, EPS, [head], ["plain"])

    parameters = LAYERS * (5 * D * D + HEADS * D + 2 * D * D + 6 * D * FFN) + 2 * KV * D + VOCAB * D
    return run, 2 * parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="tokens at once")
    parser.add_argument("--sweep", action="store_true", help="also time other forms of each kernel")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    def record(**values: Any) -> None:
        line = json.dumps(values)
        with open(arguments.out / "results.jsonl", "a") as file:
            file.write(line + "\n")
        print(line[:220], flush=True)

    torch.manual_seed(0)
    ceilings = measure_ceilings(DEVICE, DTYPE)
    record(part="environment", **environment_report(), copy_bytes_per_second=ceilings.bytes_per_second)
    layers, head = [Weights() for _ in range(LAYERS)], normal(VOCAB, D)
    for rows in arguments.rows:
        worst = gate(rows, layers[0])
        record(part="gate", rows=rows, error_over_allowed=worst, passed=worst < 1)
        if worst >= 1:
            raise SystemExit(f"gate red for {rows} rows: no times")
    for rows in arguments.rows:
        for name, (kernel, ours, cublas, nbytes, calls) in cases(rows, layers, head).items():
            key = kernel, decode_linear.padded_rows(rows)
            if arguments.sweep:
                chosen, tried = decode_linear.FORMS[key], []
                for n, k, stages, warps in FORMS[key[1]]:
                    decode_linear.FORMS[key] = {"BLOCK_N": n, "BLOCK_K": k, "STAGES": stages, "num_warps": warps}
                    tried.append((replay_ms(ours, 8) / calls * 1e3, (n, k, stages, warps)))
                decode_linear.FORMS[key] = chosen
                record(part="sweep", rows=rows, case=name, kernel=kernel, microseconds_form=sorted(tried))
            mine, peer = (replay_ms(run) / calls for run in (ours, cublas))
            record(
                part="kernel", rows=rows, case=name, microseconds=mine * 1e3, bytes_per_second=nbytes / mine * 1e3,
                cublas_products_alone_microseconds=peer * 1e3,
            )  # fmt: skip
        run, nbytes = all_layers(rows, layers, head)
        ms = replay_ms(run)
        record(part="layers", rows=rows, milliseconds=ms, bytes_per_second=nbytes / ms * 1e3)


if __name__ == "__main__":
    main()
