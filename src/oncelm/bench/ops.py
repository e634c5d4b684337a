"""`oncelm bench ops`: each op against its definition in float64 first, then timed beside its peers and the floor."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Sequence

import torch
from rich.table import Table
from tqdm import tqdm

from oncelm.bench.gate import GateError
from oncelm.bench.measure import CpuContention, PeakMemory, Timing, measure
from oncelm.bench.op_case import Function, OpCase, Sizes
from oncelm.bench.ops_cases import OPS
from oncelm.bench.record import Record, circumstances
from oncelm.bench.roofline import Ceilings, measure_ceilings
from oncelm.models.work import Work
from oncelm.utils.environment import environment_report, package_version
from oncelm.utils.errors import check_choice, check_positive

OURS = "oncelm"
SHORTEST_RUN = 0.02  # seconds; a repeat is as many calls as take this long, so that the clock's own time does not count
MOST_CALLS = 50  # in a repeat

# relative error that is rounding, whoever's is larger
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-4, torch.bfloat16: 1e-3}
DISAGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of a peer
PEER_PACKAGES = ("flash-linear-attention", "liger-kernel", "nvidia-cudnn-frontend")


def run_ops(
    names: Sequence[str] | None = None,
    *,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int = 3,
    on_record: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Check all ops named (None: every one), then time them.

    Args:
        names: keys of OPS.
        device: sets the sizes.
        dtype: of the inputs.
        repeats: of each timing; the median counts.
        on_record: called with each record as soon as it is there.

    Returns:
        Records: op, pass ("forward" or "forward + backward"), who, seconds, floor, errors of the gate. A peer that
        fails or disagrees gives one with `error`.

    Raises:
        GateError: an op is wrong; nothing was measured.
    """
    names = list(OPS) if names is None else list(names)
    for name in names:
        check_choice("op", name, OPS)
    check_positive(repeats=repeats)
    kind = "cuda" if device.type == "cuda" else "cpu"
    environment = environment_report() | {name: package_version(name) for name in PEER_PACKAGES}
    records = []
    with tqdm(total=2 * len(names) + 1, desc="correctness gates", unit="op", dynamic_ncols=True) as bar:
        errors = {}
        for name in names:
            errors[name] = check_op(name, device, dtype)
            bar.update()
        bar.set_description("machine ceilings")
        ceilings = measure_ceilings(device, dtype)
        bar.update()
        for name in names:
            case = OPS[name]()
            for sizes in case.sizes[kind]:
                for figures in _measure_case(case, sizes, device, dtype, repeats, ceilings, bar, name):
                    record = {
                        "benchmark": "ops",
                        "op": name,
                        **figures,
                        "sizes": sizes,
                        **circumstances(device, dtype, errors[name], environment, ceilings),
                    }
                    records.append(record)
                    on_record(record)
            bar.update()
    return records


def check_op(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, list[float]]:
    """Relative errors against float64, "ours" and "plain", of the output and of each gradient at the gate's sizes.

    Raises:
        GateError: ours is above twice that of plain PyTorch in the same dtype, beyond rounding, or NaN.
    """
    case = OPS[name]()
    (sizes,) = case.sizes["gate"]
    tensors = _inputs(case, sizes, device, dtype)
    doubles = [x.double() if x.is_floating_point() else x for x in tensors]
    d_output = None if case.work_both is None else _output_gradient(_results(case.exact(sizes), doubles)[0])
    exact = _results(case.exact(sizes), doubles, d_output)
    errors = {}
    for who, function in (("ours", case.ours(sizes)), ("plain", case.plain(sizes))):
        found = _results(function, tensors, d_output)
        errors[who] = [_error(x, y) for x, y in zip(found, exact, strict=True)]
    for ours, plain in zip(errors["ours"], errors["plain"], strict=True):
        if not ours <= max(2 * plain, ROUNDING[dtype]):
            raise GateError(
                f"{name} on {device} in {str(dtype).removeprefix('torch.')} differs from its definition by {ours:.2g}, "
                f"plain PyTorch by {plain:.2g}: nothing is measured."
            )
    return errors


def _measure_case(
    case: OpCase,
    sizes: Sizes,
    device: torch.device,
    dtype: torch.dtype,
    repeats: int,
    ceilings: Ceilings,
    bar: tqdm,
    name: str,
) -> list[Record]:
    """Ours and each peer that is installed, forward and, where there is one, backward too."""
    tensors = _inputs(case, sizes, device, dtype)
    expected = _results(case.ours(sizes), tensors)[0]
    passes: dict[str, tuple[Work, torch.Tensor | None]] = {"forward": (case.work(sizes, dtype.itemsize), None)}
    if case.work_both is not None:
        passes["forward + backward"] = (case.work_both(sizes, dtype.itemsize), _output_gradient(expected))
    records: list[Record] = []
    for who, load in {OURS: case.ours, **case.peers}.items():
        bar.set_description(f"{name} {who}")
        try:
            function = load(sizes)
        except ImportError:
            continue
        except Exception as error:
            if who == OURS:
                raise
            records.append({"pass": "forward", "subject": who, "error": _reason(error)})
            continue
        for what, (work, d_output) in passes.items():
            record: Record = {"pass": what, "subject": who}
            call = functools.partial(_results, function, tensors, d_output)
            try:
                difference = _error(call()[0], expected)
                if not difference <= DISAGREEMENT[dtype]:
                    raise ValueError(f"its output differs from ours by {difference:.2g}")
                record |= _figures(call, repeats, device)
            except Exception as error:
                if who == OURS:
                    raise
                record["error"] = _reason(error)  # it is the peer's to fail
            else:
                floor = ceilings.floor_seconds(work)
                record |= {"flops": work.flops, "bytes": work.bytes, "floor_seconds": floor}
                record["roofline_share"] = floor / record["seconds"]
            records.append(record)
            _free(device)
    return records


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def _figures(call: Callable[[], object], repeats: int, device: torch.device) -> Record:
    with PeakMemory(device) as peak:
        call()
    first = measure(call, 1, device).median
    calls = max(1, min(MOST_CALLS, math.ceil(SHORTEST_RUN / first)))

    def several() -> None:
        for _ in range(calls):
            call()

    with CpuContention() as others:
        timing = measure(several, repeats, device)
    timing = Timing(tuple(run / calls for run in timing.runs))
    return {
        "seconds": timing.median,
        "runs": list(timing.runs),
        "repeats": len(timing.runs),
        "calls": calls,
        "spread": timing.spread,
        "peak_bytes": peak.bytes,
        "cores_busy_elsewhere": round(others.cores, 2),
    }


def _inputs(case: OpCase, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    return list(case.inputs(sizes, normal))


def _output_gradient(output: torch.Tensor) -> torch.Tensor:
    """Normal numbers that every dtype holds."""
    generator = torch.Generator(output.device).manual_seed(1)
    return torch.randn(output.shape, generator=generator, device=output.device, dtype=torch.bfloat16)


def _results(
    function: Function, tensors: Sequence[torch.Tensor], d_output: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The output and, with an output gradient, those of all floating tensors."""
    if d_output is None:
        with torch.no_grad():
            return [function(*tensors)]
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    output = function(*leaves)
    learning = [x for x in leaves if x.requires_grad]
    return [output.detach(), *torch.autograd.grad(output, learning, d_output.to(output.dtype))]


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference, relative to the norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def ops_table(records: Sequence[Record]) -> Table:
    """A row a record; times of peers also as a multiple of ours."""
    first = records[0]
    flops, moved = first["ceiling_flops_per_second"], first["ceiling_bytes_per_second"]
    caption = f"measured ceilings {flops / 1e12:.3g} TFLOP/s, {moved / 1e9:.3g} GB/s; every op passed its gate"
    drawn = Table(title=f"ops, {first['dtype']}, {first['device']}", caption=caption, caption_justify="left")
    for title in ("pass", "who"):
        drawn.add_column(title)
    for title in ("time", f"/ {OURS}'s", "floor", "of floor", "peak"):
        drawn.add_column(title, justify="right")
    ours: dict[tuple, float] = {}
    previous = None
    for record in records:
        case = (record["op"], *record["sizes"].items())
        if case != previous:
            drawn.add_section()
            drawn.add_row(
                f"[bold]{record['op']}", " ".join(f"{name}{value}" for name, value in record["sizes"].items())
            )
        if record["subject"] == OURS:
            ours[case, record["pass"]] = record["seconds"]
        if "error" in record:
            figures = [record["error"]]
        else:
            ratio = record["seconds"] / ours[case, record["pass"]]
            figures = [
                f"{record['seconds'] * 1e3:.3g} ms",
                "" if record["subject"] == OURS else f"{ratio:.2f}x",
                f"{record['floor_seconds'] * 1e3:.3g} ms",
                f"{record['roofline_share']:.0%}",
                f"{record['peak_bytes'] / 2**20:,.0f} MiB",
            ]
        drawn.add_row(record["pass"], record["subject"], *figures)
        previous = case
    return drawn
