"""What every record ends with."""

from __future__ import annotations

from datetime import datetime

import torch

from oncelm.bench.record import circumstances
from oncelm.bench.roofline import Ceilings


def test_circumstances() -> None:
    plain = circumstances(torch.device("cpu"), torch.bfloat16, {"error": 0.1}, {"torch": "2"})
    assert list(plain) == ["dtype", "device", "gate_errors", "time", "environment"]
    assert (plain["dtype"], plain["device"]) == ("bfloat16", "cpu")
    assert datetime.fromisoformat(plain["time"]).tzinfo is not None
    measured = circumstances(torch.device("cpu"), torch.bfloat16, {}, {}, Ceilings(3.0, 2.0))
    assert measured.keys() - plain.keys() == {"ceiling_flops_per_second", "ceiling_bytes_per_second"}
    assert (measured["ceiling_flops_per_second"], measured["ceiling_bytes_per_second"]) == (3.0, 2.0)
