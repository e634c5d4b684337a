"""Decode attention on one GPU: correctness gates, then timings beside torch's SDPA and the bytes' floor.

    PYTHONPATH=src python3 benchmarks/gpu_decode_attention.py --out results

Parts, each in a forked process of its own, so that a crash or a hang costs one part only:

    compile  the kernels of the parts below, in parallel, into Triton's cache
    gates    error against float64, at most twice that of torch's SDPA in the same dtype; paged equal to contiguous, bit
             for bit; one CUDA graph for all lengths; offsets beyond 32 bits; torch.compile. The parts below run only
             if all pass
    sweep    with --sweep: other forms of split_kernel than those in decode_triton.py
    table    every case beside its floor: the time to read keys, values and scales once at READ_BANDWIDTH
    join     split_kernel alone, and join_kernel launched early or not
    peer     torch's flash and memory-efficient SDPA on the same tensors

A time is that of a call in a CUDA graph of several, over caches of at least ROTATED bytes in all, so that none is read
from the L2 cache. Everything is appended to results.jsonl as it comes.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_gated_retention import error, graphed, record, recorded
from torch.nn.attention import SDPBackend, sdpa_kernel

from oncelm.ops import decode_attention, quantize_kv
from oncelm.ops.attention import decode

READ_BANDWIDTH = {"H100": 3.04e12, "H200": 4.2e12}  # bytes a second that a card reads (docs/performance.md)
ROTATED = 10**9
KEPT = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn, "int8": torch.int8}
K = 1024


@dataclass(frozen=True)
class Case:
    """N sequences of `tokens` tokens; group query heads a key/value head; page 0: contiguous."""

    tokens: int
    N: int = 1
    T: int = 1
    H_kv: int = 8
    group: int = 3
    D: int = 128
    kept: str = "bfloat16"
    page: int = 0
    capacity: int = 0  # tokens that the cache has room for; 0: just these

    @property
    def moved(self) -> int:
        """Bytes of keys, values and scales in use."""
        a_vector = self.D * KEPT[self.kept].itemsize + (0 if self.kept == "bfloat16" else 4)
        return 2 * self.N * self.tokens * self.H_kv * a_vector

    def tensors(self) -> dict[str, torch.Tensor]:
        """A cache of random numbers (a query too), which lies in memory head by head, in each block if paged."""
        capacity = max(self.capacity, self.tokens)
        blocks, size = (self.N * -(-capacity // self.page), self.page) if self.page else (self.N, capacity)
        made = {"q": torch.randn(self.N, self.T, self.H_kv * self.group, self.D, device="cuda", dtype=torch.bfloat16)}
        for name in "kv":
            x = torch.empty(blocks, self.H_kv, size, self.D, device="cuda", dtype=KEPT[self.kept])
            scales = torch.empty(blocks, self.H_kv, size, device="cuda")
            for head in range(self.H_kv):
                values = torch.randn(blocks, size, self.D, device="cuda", dtype=torch.bfloat16)
                if self.kept == "bfloat16":
                    x[:, head] = values
                else:
                    quantised = quantize_kv(values, KEPT[self.kept])
                    x.view(torch.uint8)[:, head], scales[:, head] = quantised[0].view(torch.uint8), quantised[1]
            made[name] = x.transpose(1, 2)
            if self.kept != "bfloat16":
                made[f"{name}_scale"] = scales.transpose(1, 2)
        made["lengths"] = torch.full((self.N,), self.tokens, device="cuda", dtype=torch.int32)
        if self.page:
            made["block_tables"] = torch.randperm(blocks, device="cuda").view(self.N, -1).int()
        return made

    def caches(self) -> list[dict[str, torch.Tensor]]:
        """Caches to rotate among, as many as it takes and as fit."""
        room = self.moved * max(self.capacity, self.tokens) // self.tokens
        return [self.tensors() for _ in range(max(1, min(-(-ROTATED // self.moved), 2 * 10**10 // room)))]


LENGTHS = (8 * K, 32 * K, 128 * K, 512 * K, 1024 * K)
CASES = [
    *(Case(tokens, group=group, kept=kept) for tokens in LENGTHS for group in (3, 8) for kept in KEPT),
    *(Case(tokens, group=group, page=64) for tokens in LENGTHS for group in (3, 8)),
    *(Case(128 * K, kept=kept, page=64) for kept in ("float8", "int8")),
    *(Case(128 * K, page=page) for page in (16, 256)),
    *(Case(32 * K, N=16, group=group, kept=kept, page=page) for group in (3, 8) for kept in KEPT for page in (0, 64)),
    *(Case(128 * K, T=T, group=group) for T in (4, 8) for group in (3, 8)),
    *(Case(128 * K, D=D) for D in (64, 256)),
    Case(8 * K, capacity=1024 * K),
]
PEER_CASES = [
    *(Case(tokens, group=group) for tokens in LENGTHS for group in (3, 8)),
    *(Case(32 * K, N=16, group=group) for group in (3, 8)),
]


def kernels():
    """Our module, imported late: it needs Triton."""
    from oncelm.ops.attention import decode_triton

    return decode_triton


def describe(case: Case) -> dict:
    """What differs from the default case, and the size."""
    default = Case(0)
    return {name: value for name, value in vars(case).items() if name == "tokens" or value != getattr(default, name)}


# ---------------------------------------------------------------------------------------------------------------- gates

GATES = (  # tokens of each sequence, T, (H, H_kv), D
    ((5000,), 1, (24, 8), 128),
    ((3000, 0, 1, 777), 4, (16, 2), 64),
    ((1500, 64, 3), 8, (16, 1), 256),
    ((900, 17), 2, (4, 4), 32),
    ((40000, 300), 8, (16, 2), 128),
)
FP8, INT8 = torch.float8_e4m3fn, torch.int8
STORED = (  # dtype of q, and of k and v (None: the same)
    (torch.bfloat16, None),
    (torch.bfloat16, FP8),
    (torch.bfloat16, INT8),
    (torch.float16, None),
    (torch.float16, FP8),
    (torch.float32, None),
    (torch.float32, INT8),
)
FLOOR = 5e-7
PAGE = 64


def gate_inputs(gate, dtype: torch.dtype, kept: torch.dtype | None) -> dict[str, torch.Tensor]:
    """Random tensors; what lies behind a sequence's length is NaN where the dtype has it."""
    lengths, T, (H, H_kv), D = gate
    N, S = len(lengths), -(-(max(lengths) + 3) // PAGE) * PAGE
    made = {"q": torch.randn(N, T, H, D, device="cuda").to(dtype)}
    for name in "kv":
        x = torch.randn(N, H_kv, S, D, device="cuda").to(dtype).transpose(1, 2)
        if kept is not None:
            x, made[f"{name}_scale"] = quantize_kv(x, kept)
        for n, length in enumerate(lengths):
            if kept is None:
                x[n, length:] = torch.nan
            else:
                x.view(torch.uint8)[n, length:] = 0x7F  # NaN in float8
        made[name] = x
    made["lengths"] = torch.tensor(lengths, device="cuda")
    return made


def paged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same cache in blocks of PAGE tokens, in random order."""
    N, S = tensors["k"].shape[:2]
    order = torch.randperm(N * S // PAGE, device="cuda")

    def blocks(x: torch.Tensor) -> torch.Tensor:
        raw = x.contiguous().view(torch.uint8).view(len(order), PAGE, *x.shape[2:-1], -1)
        moved = torch.empty_like(raw)
        moved[order] = raw
        return moved.view(x.dtype)

    made = {name: blocks(x) if name[0] in "kv" else x for name, x in tensors.items()}
    return made | {"block_tables": order.view(N, -1).int()}


def check_gate(gate, dtype: torch.dtype, kept: torch.dtype | None) -> dict:
    tensors = gate_inputs(gate, dtype, kept)
    exact_kv = []
    for name in "kv":
        x = tensors[name].double()
        exact_kv.append(x if kept is None else x * tensors[f"{name}_scale"][..., None])
    q, lengths, scale = tensors["q"], tensors["lengths"], gate[-1] ** -0.5
    expected = decode.naive(q.double(), *exact_kv, lengths, None, None, None, scale)
    plain = decode.sdpa(q, *(x.to(dtype) for x in exact_kv), lengths, None, None, None, scale)
    runs = [ours(tensors) for _ in range(3)] + [ours(paged(tensors))]
    same = all(torch.equal(run, runs[0]) for run in runs)
    errors = [error(runs[0], expected), error(plain, expected)]
    passed = same and errors[0] <= max(2 * errors[1], FLOOR)
    return {"passed": passed, "error": errors[0], "plain_error": errors[1], "equal_bits": same}


def graph_follows_lengths() -> float:
    """One captured call serves all lengths."""
    tensors = gate_inputs(((4000, 100, 0), 2, (24, 8), 128), torch.bfloat16, None)
    tensors |= {name: tensors[name].nan_to_num(1.0) for name in "kv"}
    lengths, worst = tensors["lengths"], 0.0
    held: list[torch.Tensor] = []
    replay = graphed(lambda: held.append(decode_attention(**tensors, backend="triton")))
    for new in ((1, 4000, 300), (0, 0, 0), (4032, 4031, 17), (1 << 20, -3, 2)):
        lengths.copy_(torch.tensor(new))
        replay()
        bounded = lengths.clamp(0, tensors["k"].shape[1])
        expected = decode_attention(**(tensors | {"lengths": bounded}), backend="naive")
        worst = max(worst, error(held[-1], expected) if bounded.any() else held[-1].abs().max().item())
    return worst


def large_offsets() -> float:
    """More than 2^31 elements in keys, values and in one head's rows of a token-major cache."""
    S, H_kv, D = 2**21, 9, 128
    q = torch.randn(1, 1, H_kv, D, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, S, H_kv, D, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lengths, worst = torch.tensor([S], device="cuda"), 0.0
    for x, y in ((k, v), tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))):
        o = decode_attention(q, x, y, lengths=lengths, backend="triton")
        for h in (slice(0, 1), slice(8, 9)):
            expected = decode.sdpa(q[:, :, h], k[:, :, h], v[:, :, h], lengths, None, None, None, D**-0.5)
            worst = max(worst, error(o[:, :, h], expected))
    return worst


def compiled_graph() -> float:
    tensors = Case(3000).tensors()

    def step(q):
        return decode_attention(**(tensors | {"q": q * 2}), backend="triton") + 1

    return error(torch.compile(step, fullgraph=True)(tensors["q"]), step(tensors["q"]))


def gates(out: Path, _: float) -> None:
    torch.manual_seed(0)
    green = True
    for gate, (dtype, kept) in itertools.product(GATES, STORED):
        verdict = check_gate(gate, dtype, kept)
        green &= verdict["passed"]
        record(out, "gate", gate=gate, dtype=str(dtype)[6:], kept=str(kept or dtype)[6:], **verdict)
    for check in (graph_follows_lengths, large_offsets, compiled_graph):
        worst = check()
        green &= worst < 1e-2
        record(out, "gate", check=check.__name__, passed=worst < 1e-2, error=worst)
    record(out, "gates", green=green)


# ---------------------------------------------------------------------------------------------------------------- times


def call_ms(function: Callable[[dict], torch.Tensor], caches: list[dict], calls: int = 12, replays: int = 9) -> float:
    """Milliseconds of a call in a CUDA graph of `calls` or more, median of `replays`."""
    calls = max(calls, len(caches))

    def several() -> None:
        for i in range(calls):
            function(caches[i % len(caches)])

    replay = graphed(several)
    times = []
    for _ in range(replays + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return sorted(times[2:])[replays // 2]


def timed(out: Path, part: str, who: str, case: Case, function: Callable[[dict], torch.Tensor], caches, **more) -> None:
    row = {"who": who, **describe(case), **more}
    floor = case.moved / bandwidth() * 1e3
    try:
        ms, again = (call_ms(function, caches) for _ in range(2))
        row |= {"ms": round(ms, 5), "again_ms": round(again, 5), "floor_ms": round(floor, 5)}
        row |= {"TB_s": round(case.moved / ms / 1e9, 3), "of_floor": round(floor / ms, 3)}
    except Exception as failure:
        row["failure"] = f"{type(failure).__name__}: {failure}"[:200]
    record(out, part, **row)


def bandwidth() -> float:
    """That of this card; of one that is not known, the H200's."""
    name = torch.cuda.get_device_name()
    return next((found for card, found in READ_BANDWIDTH.items() if card in name), READ_BANDWIDTH["H200"])


def ours(tensors: dict) -> torch.Tensor:
    return decode_attention(**tensors, backend="triton")


def table(out: Path, seconds: float) -> None:
    deadline = time.time() + seconds
    for case in CASES:
        if time.time() < deadline:
            timed(out, "time", "oncelm", case, ours, case.caches())


def join(out: Path, _: float) -> None:
    """What joining the parts costs, and launching its kernel early gains."""
    module = kernels()
    join_kernel = module.join_kernel

    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    for case in (Case(8 * K), Case(128 * K), Case(32 * K, N=16)):
        caches = case.caches()
        for early in (True, False, True, False):
            module._launches_early = lambda index, early=early: early
            record(out, "join", **describe(case), early=early, ms=round(call_ms(ours, caches, 24, 15), 5))
        module.join_kernel = Nothing()
        record(out, "join", **describe(case), early=None, ms=round(call_ms(ours, caches, 24, 15), 5))
        module.join_kernel = join_kernel


def peer(out: Path, seconds: float) -> None:
    deadline = time.time() + seconds
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
    for case in PEER_CASES:
        caches = case.caches()
        for name, backend in backends.items():

            def sdpa(made: dict, backend=backend) -> torch.Tensor:
                q, k, v = (made[name].transpose(1, 2) for name in "qkv")
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q, k, v, enable_gqa=backend == SDPBackend.FLASH_ATTENTION)

            def rows(made: dict, backend=backend) -> torch.Tensor:
                q, k, v = made["q"], made["k"].transpose(1, 2), made["v"].transpose(1, 2)
                with sdpa_kernel(backend):
                    return F.scaled_dot_product_attention(q.view(*k.shape[:2], -1, q.shape[-1]), k, v)

            # `rows`: the heads that share keys as queries of one head, which is how oncelm calls SDPA
            for who, function in ((f"sdpa {name}", sdpa), (f"sdpa {name} rows", rows)):
                if time.time() < deadline and not (name == "efficient" and function is sdpa):
                    timed(out, "time", who, case, function, caches)


# ---------------------------------------------------------------------------------------------------------------- sweep

SWEPT = (
    Case(128 * K),
    Case(128 * K, page=64),
    Case(128 * K, kept="float8"),
    Case(128 * K, kept="int8"),
    Case(128 * K, D=64),
    Case(128 * K, D=256),
)


def forms(case: Case) -> Iterator[tuple[int, int, int, int]]:
    """(block, warps, stages, programs a multiprocessor), all of whose tiles fit the shared memory."""
    for block, warps, stages, programs in itertools.product((32, 64, 128), (1, 2, 4), (2, 3, 4), (2, 3, 4, 8)):
        a_tile = 2 * block * case.D * KEPT[case.kept].itemsize
        if 64 * K <= programs * (stages - 1) * a_tile <= 208 * K and 8 <= warps * programs <= 12:
            yield block, warps, stages, programs


def with_form(form: tuple[int, int, int, int], function: Callable):
    """function() with the kernel in this form."""
    module = kernels()
    own = module.config
    module.config = lambda q, k, rows: module.Config(*form)
    try:
        return function()
    finally:
        module.config = own


def sweep(out: Path, seconds: float) -> None:
    started = time.time()
    for i, case in enumerate(SWEPT):
        caches = case.caches()
        expected = ours(caches[0])

        def difference(caches=caches, expected=expected) -> float:
            return error(ours(caches[0]), expected)

        def ms(caches=caches) -> float:
            return call_ms(ours, caches, 8, 7)

        for form in forms(case):
            if time.time() - started > seconds * (i + 1) / len(SWEPT):
                break
            try:
                row = {"difference": round(with_form(form, difference), 6)}
                row["ms"] = round(with_form(form, ms), 5)
                row["TB_s"] = round(case.moved / row["ms"] / 1e9, 3)
            except Exception as failure:
                row = {"failure": f"{type(failure).__name__}: {failure}"[:120]}
            record(out, "sweep", **describe(case), form=form, **row)
            torch.cuda.synchronize()  # raises after a fault, which ends the sweep: no later result would be true


# -------------------------------------------------------------------------------------------------------------- compile


def compile_one(task) -> str | None:
    """Compile the kernels of a gate, a case, or a case in a form, without running them."""
    from triton.runtime.jit import JITFunction

    JITFunction.__getitem__ = lambda self, grid: (
        lambda *args, **kwargs: self.run(*args, grid=grid, warmup=True, **kwargs)
    )
    torch.set_num_threads(1)
    try:
        if task[0] == "gate":
            tensors = gate_inputs(*task[1:])
            ours(tensors)
            ours(paged(tensors))
        else:
            case, form = task
            tensors = case.tensors()
            ours(tensors) if form is None else with_form(form, lambda: ours(tensors))
    except Exception as failure:
        return f"{type(failure).__name__}: {failure}"[:200]
    return None


def compile_all(out: Path, seconds: float, timing: bool = True, sweeping: bool = False) -> None:
    tasks: list[tuple] = [("gate", gate, *stored) for gate, stored in itertools.product(GATES, STORED)]
    if timing:
        tasks += [(case, None) for case in dict.fromkeys(replace(case, tokens=K, capacity=0) for case in CASES)]
    if sweeping:
        tasks += [(replace(case, tokens=K), form) for case in SWEPT for form in forms(case)]
    workers = max(1, min(15, (os.cpu_count() or 2) - 1))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        futures = {pool.submit(compile_one, task): task for task in tasks}
        for future in as_completed(futures, timeout=seconds):
            if future.result():
                record(out, "compile", task=str(futures[future]), failure=future.result())


# ----------------------------------------------------------------------------------------------------------------- main


def summary(out: Path) -> None:
    best = sorted((r for r in recorded(out, "sweep") if "ms" in r), key=lambda r: r["ms"])
    for case in SWEPT:
        for r in [r for r in best if all(r.get(k) == v for k, v in describe(case).items())][:4]:
            print(describe(case), r["form"], r["TB_s"], r["difference"])
    print(f"\n{'who':16} {'case':64} {'ms':>9} {'TB/s':>6} {'of it':>6}")
    for r in recorded(out, "time"):
        shape = " ".join(f"{name} {value}" for name, value in r.items() if name in vars(Case(0)))
        end = f"{r['ms']:9.4f} {r['TB_s']:6.3f} {r['of_floor']:6.3f}" if "ms" in r else r["failure"][:60]
        print(f"{r['who']:16} {shape:64} {end}")


def environment(out: Path, _: float) -> None:
    import triton

    device = torch.cuda.get_device_properties(0)
    row = {"gpu": device.name, "multiprocessors": device.multi_processor_count}
    row |= {"memory_GB": round(device.total_memory / 1e9, 1), "torch": torch.__version__, "triton": triton.__version__}
    record(out, "environment", **row, python=sys.version.split()[0], cpus=os.cpu_count())


PARTS = {
    "environment": environment,
    "compile": compile_all,
    "gates": gates,
    "sweep": sweep,
    "table": table,
    "join": join,
    "peer": peer,
}


def part(name: str, out: Path, seconds: float, *more) -> None:
    try:
        PARTS[name](out, seconds, *more)
    except Exception:
        record(out, "failure", name=name, failure=traceback.format_exc()[-1500:])
        raise


def run_part(name: str, out: Path, limit: float, *more) -> bool:
    """One part in a process of its own, killed after `limit` seconds; whether it ended well."""
    process = multiprocessing.get_context("fork").Process(target=part, args=(name, out, 0.9 * limit, *more))
    started = time.time()
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
    record(out, "process", name=name, code=process.exitcode, s=round(time.time() - started, 1))
    return process.exitcode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results.jsonl")
    parser.add_argument("--gates-only", action="store_true", help="no timings")
    parser.add_argument("--sweep", action="store_true", help="also time other forms of the kernel")
    parser.add_argument("--seconds", type=float, default=300, help="budget of the whole run")
    options = parser.parse_args()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.jsonl").unlink(missing_ok=True)
    deadline = time.time() + options.seconds
    kernels()  # imported once, before the parts are forked

    def run(name: str, share: float, *more) -> bool:
        return run_part(name, out, share * (deadline - time.time()), *more)

    run("environment", 0.5)
    run("compile", 0.5, not options.gates_only, options.sweep)
    if not run("gates", 0.5) or not recorded(out, "gates")[-1]["green"]:
        sys.exit("a gate is red (see above): no timings")
    if options.gates_only:
        return
    if options.sweep:
        run("sweep", 0.4)
    run("table", 0.6)
    run("join", 0.3)
    run("peer", 0.95)
    summary(out)


if __name__ == "__main__":
    main()
