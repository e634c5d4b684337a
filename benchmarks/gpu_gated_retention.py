"""Gated retention on one GPU: correctness gates, then timings beside the peers and the floor.

    PYTHONPATH=src python3 benchmarks/gpu_gated_retention.py --out results

Parts, each in a process of its own, so that a crash or a hang costs one part only:

    compile  the kernels of gates and table (and of the sweep), in parallel, into Triton's cache
    gates    error of every output and gradient against float64, at most twice that of plain PyTorch in the same dtype;
             repeatability; offsets beyond 32 bits; torch.compile. The parts below run only if all are green
    sweep    with --sweep: the time of every neighbour of each kernel's form
    table    forward, and forward + backward, beside plain PyTorch and the floor; the time of each kernel
    peer     flash-linear-attention, if it is installed

Everything is appended to results.jsonl as it comes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch

from oncelm.ops import gated_retention
from oncelm.ops.gated_retention.chunk import chunk as portable
from oncelm.ops.packed import by_sequence

SHAPES = {  # name: (B, T, H, D)
    "long128": (1, 32768, 24, 128),
    "long256": (1, 32768, 12, 256),
    "long64": (1, 32768, 24, 64),
    "train256": (8, 2048, 8, 256),
    "train128": (16, 2048, 6, 128),
    "prefill128": (1, 8192, 24, 128),
    "prefill256": (1, 8192, 12, 256),
}
SEGMENTS = {"long128": (3072, 4096, 6656, 8192), "long256": (3072, 4096, 5504, 6656), "long64": (3072, 6656)}
SWEPT = ("long128", "long256", "long64")
PEER = ("long128", "long256", "train256")
NAMES = ("o", "final_state", "dq", "dk", "dv", "dg", "d_initial_state")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SCALE = 0.09


def kernels():
    """Our module, imported late: it needs Triton."""
    from oncelm.ops.gated_retention import triton

    return triton


def configs():
    """The module of their compiled forms."""
    from oncelm.ops.gated_retention import triton_configs

    return triton_configs


def record(out: Path, part: str, **values) -> None:
    """Append a line to results.jsonl, and print its beginning."""
    line = json.dumps({"part": part, **values})
    with open(out / "results.jsonl", "a") as file:
        file.write(line + "\n")
    print(line if len(line) < 400 else line[:400] + "...", flush=True)


def recorded(out: Path, part: str) -> list[dict]:
    path = out / "results.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["part"] == part]


def inputs(B, T, H, K, V, dtype, sequences=None, seed=0) -> tuple[torch.Tensor, ...]:
    """q, k, v, g, initial state, do, d_final: unit normal, decays like a trained model's."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)

    N = sequences or B
    q, k, v, do = (normal(B, T, H, D, dtype=dtype) for D in (K, K, V, V))
    g = torch.nn.functional.logsigmoid(normal(B, T, H)) / 16
    return q, k, v, g, normal(N, H, K, V), do, normal(N, H, K, V)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def gradients(function: Callable, tensors) -> dict[str, torch.Tensor]:
    """Outputs of function(q, k, v, g, state) and gradients for the given do and d_final, under NAMES."""
    *leaves, do, d_final = tensors
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    o, final = function(*leaves)
    found = torch.autograd.grad((o, final), leaves, (do.to(o.dtype), d_final.to(final.dtype)))
    return dict(zip(NAMES, [o.detach(), final.detach(), *found], strict=True))


# ---------------------------------------------------------------------------------------------------------------- gates

GATES = (  # B, T, H, K, V, borders of packed sequences, segment (0: chosen); few heads and dims: few kernels to compile
    (2, 1000, 2, 64, 64, None, 0),
    (2, 777, 2, 128, 128, None, 0),
    (1, 63, 2, 128, 128, None, 0),
    (1, 1, 2, 128, 128, None, 0),
    (1, 8191, 2, 128, 128, None, 0),
    (1, 8192, 2, 128, 128, None, 1024),
    (1, 8192, 2, 128, 128, None, 4096),  # long enough for chunks that have decayed to 0
    (1, 2049, 2, 256, 256, None, 0),
    (1, 4096, 2, 256, 256, None, 1024),
    (1, 1500, 2, 64, 256, None, 512),
    (1, 1500, 2, 256, 128, None, 512),
    (1, 3000, 2, 128, 128, (0, 0, 700, 701, 701, 2400, 3000, 3000), 0),
    (1, 3000, 2, 128, 128, (0, 0, 700, 701, 701, 2400, 3000, 3000), 256),
    (1, 900, 2, 48, 80, None, 0),
    (1, 900, 2, 32, 128, None, 256),  # narrower than the block of the form for 128
    (1, 900, 2, 16, 256, None, 256),
)
FLOOR = 5e-7  # four roundings to float32: below, which of two errors is larger is luck


def gate_inputs(dtype: str, gate) -> tuple:
    B, T, H, K, V, borders, _ = gate
    tensors = inputs(B, T, H, K, V, DTYPES[dtype], sequences=len(borders) - 1 if borders else None)
    return tensors, None if borders is None else torch.tensor(borders, device="cuda")


def ours_at(cu_seqlens, segment: int) -> Callable:
    return lambda q, k, v, g, state: kernels().chunk(q, k, v, g, SCALE, state, cu_seqlens, segment=segment)


def gates(out: Path, _: float) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    green = True
    for dtype, gate in itertools.product(DTYPES, GATES):
        passed, errors = check_gate(dtype, gate)
        green &= passed
        record(out, "gate", dtype=dtype, gate=gate, passed=passed, errors_ours_plain=errors)
    for check in (large_offsets, compiled_graph):
        errors, allowed = check()
        passed = max(errors) <= allowed
        green &= passed
        record(out, "gate", check=check.__name__, passed=passed, errors=errors, allowed=allowed)
    record(out, "gates", green=green)


def check_gate(dtype: str, gate) -> tuple[bool, dict[str, list[float]]]:
    """Whether every error is at most twice plain PyTorch's and three runs are bit-equal; errors [ours, plain]."""
    tensors, cu_seqlens = gate_inputs(dtype, gate)

    def plain(q, k, v, g, state):
        if cu_seqlens is None:
            return portable(q, k, v, g, SCALE, state, 64)
        return by_sequence(lambda *args: portable(*args, 64), (q, k, v, g), (SCALE,), state, cu_seqlens)

    runs = [gradients(ours_at(cu_seqlens, gate[-1]), tensors) for _ in range(3)]
    exact = gradients(plain, [x.double() for x in tensors])
    with torch.autocast("cuda", dtype=DTYPES[dtype], enabled=dtype != "float32"):
        rounded = gradients(plain, tensors)
    errors = {name: [error(found[name], exact[name]) for found in (runs[0], rounded)] for name in NAMES}
    close = all(mine <= max(2 * theirs, FLOOR) for mine, theirs in errors.values())  # NaN is not
    repeatable = all(torch.equal(run[name], runs[0][name]) for run in runs[1:] for name in NAMES)
    return close and repeatable, {name: [float(f"{e:.2e}") for e in pair] for name, pair in errors.items()}


def large_offsets() -> tuple[list[float], float]:
    """More than 2^31 elements a tensor; its end against the portable form on the tail alone: the rest has decayed."""
    T, H, D, tail = 4 * 2**20, 9, 64, 4096
    q, k, v, do = (torch.randn(1, T, H, D, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    g = torch.full((1, T, H), -0.05, device="cuda")
    leaves = [x.requires_grad_() for x in (q, k, v, g)]
    short = [x[:, -tail:].detach().double().requires_grad_() for x in leaves]
    expected, state = portable(*short, SCALE, None)
    expected_gradients = torch.autograd.grad(expected, short, do[:, -tail:].double())
    errors = []
    with torch.no_grad():
        for segment in (0, T):
            o, final = kernels().chunk(*leaves, SCALE, None, segment=segment)
            errors += [error(o[:, -tail // 2 :], expected[:, -tail // 2 :]), error(final, state)]
            del o
    o = kernels().chunk(*leaves, SCALE, None)[0]
    found = torch.autograd.grad(o, leaves, do)
    errors += [error(x[:, -tail // 2 :], y[:, -tail // 2 :]) for x, y in zip(found, expected_gradients, strict=True)]
    return errors, 1e-2


def compiled_graph() -> tuple[list[float], float]:
    """Under torch.compile the graph is whole and the gradients are those of the eager call."""
    q, k, v, g, _, do, _ = inputs(1, 2048, 2, 128, 128, torch.bfloat16)
    leaves = [x.requires_grad_() for x in (q, k, v, g)]

    def step(q, k, v, g):
        return (gated_retention(q, k, v, g, backend="triton")[0] * do).sum()

    expected = torch.autograd.grad(step(*leaves), leaves)
    found = torch.autograd.grad(torch.compile(step, fullgraph=True)(*leaves), leaves)
    return [error(x, y) for x, y in zip(found, expected, strict=True)], 1e-2


# ---------------------------------------------------------------------------------------------------------------- sweep


def neighbours(name: str) -> Iterator[tuple[tuple[str, int], tuple[int, int, int, int] | int]]:
    """Each kernel's key in CONFIGS and the forms one step from its own: chunk, block, warps or stages.

    Of a kernel of hopper.py only the block (an int) can vary.
    """
    D = SHAPES[name][-1]
    sample = torch.empty(1, 1, 1, D, dtype=torch.bfloat16, device="cuda")
    for (kernel, dim), c in configs().CONFIGS.items():
        if dim != D:
            continue
        if kernels().config(kernel, sample, sample).num_stages == 0:
            block = configs().HOPPER_BLOCKS[kernel, dim]
            yield from (((kernel, dim), other) for other in (block // 2, 2 * block) if 64 <= other <= min(128, D))
            continue
        forms = [(chunk, c.block, c.num_warps, c.num_stages) for chunk in (c.chunk // 2, 2 * c.chunk)]
        forms += [(c.chunk, block, c.num_warps, c.num_stages) for block in (c.block // 2, 2 * c.block)]
        forms += [(c.chunk, c.block, 12 - c.num_warps, c.num_stages)]
        forms += [(c.chunk, c.block, c.num_warps, c.num_stages + more) for more in (-1, 1)]
        for chunk, block, warps, stages in forms:
            miscompiled = block < 64 and stages == 1  # by Triton 3.6: wrong results, even illegal accesses
            if 32 <= chunk <= 128 and 32 <= block <= D and stages >= 1 and not miscompiled:
                yield (kernel, dim), (chunk, block, warps, stages)


def compile_one(task) -> str | None:
    """Compile the kernels of a gate (dtype, gate), or of a shape (name, key, form of one kernel); nothing runs."""
    from triton.runtime.jit import JITFunction

    JITFunction.__getitem__ = lambda self, grid: (
        lambda *args, **kwargs: self.run(*args, grid=grid, warmup=True, **kwargs)
    )
    torch.set_num_threads(1)
    try:
        if task[0] in DTYPES:
            tensors, cu_seqlens = gate_inputs(*task)
            gradients(ours_at(cu_seqlens, task[1][-1]), tensors)
        else:
            name, key, form = task
            _, _, H, D = SHAPES[name]
            q, k, v, g, _, do, _ = inputs(1, 1100, H, D, D, torch.bfloat16)
            leaves = [x.requires_grad_() for x in (q, k, v, g)]
            for segment in (512, 2048):  # several segments, and one
                ours = without_state(segment)
                with_form(key, form, lambda ours=ours: torch.autograd.grad(ours(*leaves)[0], leaves, do))
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"[:200]
    return None


def compile_all(out: Path, seconds: float, sweeping: bool = False) -> None:
    tasks: list[tuple] = [*itertools.product(DTYPES, GATES), *((name, None, None) for name in SHAPES)]
    if sweeping:
        tasks += [(name, key, form) for name in SWEPT if name in SHAPES for key, form in neighbours(name)]
    workers = max(1, min(15, (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(compile_one, task): task for task in tasks}
        for future in as_completed(futures, timeout=seconds):
            if future.result():
                record(out, "compile", task=futures[future], failure=future.result())


def with_form(key, form, function: Callable):
    """function() with one kernel's form replaced, if a key is given."""
    if key is None:
        return function()
    table = configs().HOPPER_BLOCKS if isinstance(form, int) else configs().CONFIGS
    own = table[key]
    table[key] = form if isinstance(form, int) else kernels().Config(*form)
    try:
        return function()
    finally:
        table[key] = own


def without_state(segment: int = 0) -> Callable:
    """Ours as the function of q, k, v, g that gives o alone."""
    return lambda q, k, v, g: kernels().chunk(q, k, v, g, SCALE, None, segment=segment)[:1]


def sweep(out: Path, seconds: float) -> None:
    deadline = time.time() + seconds
    for name in (name for name in SWEPT if name in SHAPES):
        B, T, H, D = SHAPES[name]
        q, k, v, g, _, do, _ = inputs(B, T, H, D, D, torch.bfloat16)
        leaves = [x.requires_grad_() for x in (q, k, v, g)]

        def both(leaves=leaves, do=do):
            o = kernels().chunk(*leaves, SCALE, None)[0]
            return [o, *torch.autograd.grad(o, leaves, do)]

        expected, own = both(), kernel_times(both)
        record(out, "sweep", shape=name, form="own", ms=own)
        for key, form in neighbours(name):
            if time.time() > deadline:
                return
            try:
                found = with_form(key, form, both)
                worst = max(error(x, y) for x, y in zip(found, expected, strict=True))
                ms = with_form(key, form, lambda f=both: kernel_times(f))[f"{key[0]}_kernel"]
                row = {"ms": ms, "own_ms": own[f"{key[0]}_kernel"], "difference": float(f"{worst:.1e}")}
            except Exception as failure:
                row = {"failure": f"{type(failure).__name__}: {failure}"[:120]}
            record(out, "sweep", shape=name, kernel=key[0], form=form, **row)
            torch.cuda.synchronize()  # raises after a fault, which ends the sweep: no later result would be true


def kernel_times(function: Callable) -> dict[str, float]:
    """Milliseconds a call in each kernel, from the profiler."""
    from torch.profiler import ProfilerActivity, profile

    function()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(5):
            function()
        torch.cuda.synchronize()
    return {e.key[:40]: round(e.device_time_total / 5e3, 4) for e in profiled.key_averages() if e.device_time_total}


# ---------------------------------------------------------------------------------------------------------------- table


def median_ms(function: Callable, seconds: float = 0.15, warm: int = 3) -> float:
    """Median over event-timed calls."""
    for _ in range(warm):
        function()
    torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    count = int(min(200, max(7, seconds / max(time.perf_counter() - started, 1e-5))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[count // 2]


def graphed(function: Callable) -> Callable:
    """`function` captured in a CUDA graph: its time without launch gaps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def ceilings(out: Path) -> float:
    """Bytes a second of a large copy (recorded beside the rate of a large matrix product), measured once."""
    if found := recorded(out, "ceilings"):
        return found[0]["copy_TB_s"] * 1e12
    x = torch.randn(2, 2**28, device="cuda")
    bandwidth = x.nbytes / median_ms(lambda: x[0].copy_(x[1])) * 1e3
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rate = 2 * 8192**3 / median_ms(lambda: a @ b) * 1e3
    record(out, "ceilings", copy_TB_s=round(bandwidth / 1e12, 3), gemm_TFLOP_s=round(rate / 1e12, 1))
    return bandwidth


def timed(out: Path, who: str, name: str, what: str, function: Callable, dtype=torch.bfloat16) -> None:
    """Time function(q, k, v, g) -> (o, ...) on a shape, beside the floor: every tensor read or written once.

    what: "forward", "both" (with the gradients of q, k, v, g), and either "graph"; "forward weak" with decays so weak
    that nothing is forgotten.
    """
    B, T, H, D = SHAPES[name]
    q, k, v, g, _, do, _ = inputs(B, T, H, D, D, dtype)
    if what.endswith("weak"):
        g.fill_(-1e-4)
    leaves = [x.requires_grad_() for x in (q, k, v, g)]
    forward = what.startswith("forward")

    def call():
        with torch.set_grad_enabled(not forward):
            o = function(*leaves)[0]
            return o if forward else torch.autograd.grad(o, leaves, do.to(o.dtype))

    tensors = 4 if forward else 11
    moved = tensors * q.nbytes
    flops = B * T * H * (2 * 64 * 2 * D + 4 * D * D) * (1 if forward else 3.5)
    floor = moved / ceilings(out) * 1e3
    row = {"who": who, "goal": name, "shape": [B, T, H, D], "dtype": str(dtype)[6:], "what": what}
    try:
        call()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        row["peak_GB"] = round((torch.cuda.max_memory_allocated() - before) / 1e9, 3)
        ms, again = (median_ms(graphed(call) if what.endswith("graph") else call) for _ in range(2))
        row |= {"ms": round(ms, 4), "again_ms": round(again, 4), "floor_ms": round(floor, 4)}
        row |= {"of_floor": round(floor / ms, 3), "TFLOP_s": round(flops / ms / 1e9, 1)}
    except Exception as failure:
        row["failure"] = f"{type(failure).__name__}: {failure}"[:300]
    record(out, "time", **row)


def plain_step(q, k, v, g) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.autocast("cuda", dtype=q.dtype, enabled=q.dtype != torch.float32):
        return portable(q, k, v, g, SCALE, None, 64)


def table(out: Path, seconds: float) -> None:
    deadline = time.time() + seconds
    ours = without_state()
    for name in SHAPES:
        for what in ("forward", "both", "forward graph", "both graph", "forward weak"):
            timed(out, "oncelm", name, what, ours)
        B, T, H, D = SHAPES[name]
        q, k, v, g, _, do, _ = inputs(B, T, H, D, D, torch.bfloat16)
        leaves = [x.requires_grad_() for x in (q, k, v, g)]
        ms = kernel_times(lambda do=do, leaves=leaves: torch.autograd.grad(ours(*leaves)[0], leaves, do))
        record(out, "kernels", goal=name, ms=ms)
    for name in SHAPES:
        for size in SEGMENTS.get(name, ()):
            for what in ("forward", "both"):
                timed(out, f"segments of {size}", name, what, without_state(size))
    if "train128" in SHAPES:
        timed(out, "oncelm", "train128", "both", ours, torch.float32)
        timed(out, "plain", "train128", "both", plain_step, torch.float32)
    for name in SHAPES:
        for what in ("forward", "both") if name.startswith("train") else ("forward",):
            if time.time() < deadline:
                timed(out, "plain", name, what, plain_step)


def peer(out: Path, seconds: float) -> None:
    """flash-linear-attention; its first call tunes itself for a while."""
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError as failure:
        record(out, "peer", failure=str(failure)[:200])
        return
    deadline = time.time() + seconds
    for what, name in [("forward", name) for name in PEER] + [("both", PEER[0])]:
        if name in SHAPES and time.time() < deadline:
            timed(out, "fla", name, what, lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g, scale=SCALE))


def summary(out: Path) -> None:
    print(f"\n{'who':8} {'shape':20} {'dtype':9} {'what':14} {'ms':>9} {'floor':>8} {'of it':>6} {'TF/s':>6} {'GB':>6}")
    for r in recorded(out, "time"):
        shape = "B{} T{} H{} D{}".format(*r["shape"])
        start = f"{r['who']:8} {shape:20} {r['dtype']:9} {r['what']:14}"
        if "ms" in r:
            end = f"{r['ms']:9.4f} {r['floor_ms']:8.4f} {r['of_floor']:6.2f} {r['TFLOP_s']:6.1f} {r['peak_GB']:6.3f}"
        print(start, end if "ms" in r else r["failure"][:60])


# ----------------------------------------------------------------------------------------------------------------- main


def environment(out: Path, _: float) -> None:
    import triton

    device = torch.cuda.get_device_properties(0)
    row = {"gpu": device.name, "multiprocessors": device.multi_processor_count}
    row |= {"memory_GB": round(device.total_memory / 1e9, 1), "torch": torch.__version__, "triton": triton.__version__}
    record(out, "environment", **row, python=sys.version.split()[0])


PARTS = {"environment": environment, "gates": gates, "sweep": sweep, "table": table, "peer": peer}


def run_part(name: str, out: Path, limit: float) -> bool:
    """One part in a process of its own, killed after `limit` seconds; whether it ended well."""
    command = [sys.executable, __file__, "--out", str(out), "--part", name, "--seconds", str(0.9 * limit)]
    command += ["--shapes", *SHAPES]
    process = subprocess.Popen(command, start_new_session=True)
    started = time.time()
    try:
        code = process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        code = process.wait()
    record(out, "process", name=name, code=code, s=round(time.time() - started, 1))
    return code == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl")
    parser.add_argument("--part", choices=[*PARTS, "compile", "compile-sweep"], help="one part only, in this process")
    parser.add_argument("--sweep", action="store_true", help="also time the neighbours of each kernel's form")
    parser.add_argument("--seconds", type=float, default=540, help="budget of the whole run, or of the part")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=[*SHAPES], help="to time (all)")
    options = parser.parse_args()
    for name in SHAPES.keys() - set(options.shapes):
        del SHAPES[name]
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.part:
        try:
            if options.part.startswith("compile"):
                compile_all(out, options.seconds, options.part == "compile-sweep")
            else:
                PARTS[options.part](out, options.seconds)
        except Exception:
            record(out, "failure", name=options.part, failure=traceback.format_exc()[-1500:])
            raise
        return
    (out / "results.jsonl").unlink(missing_ok=True)
    deadline = time.time() + options.seconds

    def run(name: str, share: float) -> bool:
        return run_part(name, out, share * (deadline - time.time()))

    run("environment", 0.5)
    run("compile-sweep" if options.sweep else "compile", 0.4)
    if not run("gates", 0.6) or not recorded(out, "gates")[-1]["green"]:
        sys.exit("a gate is red (see above): no timings")
    if options.sweep:
        run("sweep", 0.4)
    run("table", 0.6)
    run("peer", 0.95)
    summary(out)


if __name__ == "__main__":
    main()
