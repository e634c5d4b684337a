"""What is measured becomes a record, a line of JSON, and what all records end with."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import torch

from oncelm.bench.roofline import Ceilings

Record = dict[str, Any]


def circumstances(
    device: torch.device,
    dtype: torch.dtype,
    gate_errors: object,
    environment: Record,
    ceilings: Ceilings | None = None,
) -> Record:
    """How and where something was measured, now.

    Args:
        device, dtype: of the computation.
        gate_errors: what the correctness gate found.
        environment: of `environment_report`, asked once a run.
        ceilings: of the machine in that dtype, if they were measured.
    """
    measured = {}
    if ceilings is not None:
        measured = {
            "ceiling_flops_per_second": ceilings.flops_per_second,
            "ceiling_bytes_per_second": ceilings.bytes_per_second,
        }
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "gate_errors": gate_errors,
        **measured,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": environment,
    }
