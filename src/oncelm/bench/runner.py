"""A run of `oncelm bench`: the gate, the machine's ceilings, then every target at every length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from oncelm.bench.cases import CASES, Conditions
from oncelm.bench.gate import check
from oncelm.bench.measure import CpuContention
from oncelm.bench.record import Record, circumstances
from oncelm.bench.roofline import measure_ceilings
from oncelm.bench.targets import Target
from oncelm.utils.environment import environment_report
from oncelm.utils.errors import check_choice, check_positive


def run(
    benchmark: str,
    targets: Sequence[Target],
    lengths: Sequence[int],
    *,
    dtype: torch.dtype,
    batch_size: int = 1,
    repeats: int = 3,
    peer_max_length: int | None = None,
    profile: bool = False,
    on_record: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Measure.

    Args:
        benchmark: "prefill", "decode", "memory" or "train".
        targets: the first is what the others, its peers, are compared with; all on one device.
        lengths: tokens of each sequence.
        dtype: of the computation. The targets' weights are of this dtype, but for "train" float32.
        batch_size, repeats, profile: see Conditions.
        peer_max_length: peers are not measured at greater lengths.
        on_record: called with each record as soon as it is there.

    Returns:
        Records: what was measured, how, on what. A target that runs out of memory gives one with `error`.

    Raises:
        GateError: a target is wrong; nothing was measured.
    """
    check_choice("benchmark", benchmark, CASES)
    check_positive(batch_size=batch_size, repeats=repeats, **{f"length {length}": length for length in lengths})
    plan = [
        (target, length)
        for length in lengths
        for target in targets
        if target is targets[0] or peer_max_length is None or length <= peer_max_length
    ]
    device = targets[0].model.device
    environment = environment_report()
    with tqdm(total=len(plan) + 2, desc="correctness gate", unit="case", dynamic_ncols=True) as bar:
        errors = {target.name: check(target, dtype, batch_size, training=benchmark == "train") for target in targets}
        bar.update()
        bar.set_description("machine ceilings")
        ceilings = measure_ceilings(device, dtype)
        conditions = Conditions(batch_size, repeats, dtype, ceilings, profile)
        bar.update()
        records = []
        for target, length in plan:
            bar.set_description(f"{benchmark} {target.name} {length:,} tokens")
            with CpuContention() as others:
                try:
                    figures = CASES[benchmark](target, length, conditions)
                except torch.OutOfMemoryError:
                    figures = {"error": "out of memory"}
            record = {
                "benchmark": benchmark,
                "subject": target.name,
                "length": length,
                **figures,
                "batch_size": batch_size,
                "parameters": sum(parameter.numel() for parameter in target.model.parameters()),
                "shape": target.shape(),
                "settings": dict(target.settings),
                "cores_busy_elsewhere": round(others.cores, 2),
                **circumstances(device, dtype, errors[target.name], environment, ceilings),
            }
            records.append(record)
            on_record(record)
            bar.update()
    return records
