"""Where a run writes its metrics: metrics.jsonl, a progress bar, and those of `reports.py`.

A line of metrics.jsonl is `{"step": 40, "loss": 3.2, ...}` or `{"step": 200, "validation_loss": 3.1}`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from oncelm.train.reports import Report
from oncelm.utils.files import atomic_file

# what the progress bar shows of the values of a step
_SHOWN = {
    **{"tokens_per_second": ("tokens/s", "{:,.0f}"), "grad_norm": ("norm", "{:.2f}"), "mfu": ("MFU", "{:.0%}")},
    **{"memory_gib": ("GiB", "{:.1f}"), "data_wait": ("wait", "{:.1%}"), "validation_loss": ("validation", "{:.3f}")},
}


class Metrics:
    """Reports of a run that starts, or goes on, after `start_step` steps.

    Lines of later steps, written by a run that was killed after its last checkpoint, are taken back:
    those steps are about to be done again.
    """

    def __init__(self, out: Path, start_step: int, reports: Sequence[Report] = ()) -> None:
        self.path = out / "metrics.jsonl"
        kept = _lines_until(self.path, start_step) if start_step else []
        with atomic_file(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        self._reports = reports
        # Without a terminal the bar is off, and a line is printed at each log instead.
        self._bar = tqdm(initial=start_step, desc="train", unit="step", disable=None, dynamic_ncols=True)
        self._shown: dict[str, str] = {}

    def advance(self, loss: float, planned_steps: float) -> None:
        """One step is done, of `planned_steps` (infinite while unknown)."""
        self._bar.total = None if math.isinf(planned_steps) else max(round(planned_steps), self._bar.n + 1)
        self._show(loss=f"{loss:.3f}")
        self._bar.update()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write the values of `step`, the number of steps done, to the file and the reports."""
        self._file.write(json.dumps({"step": step} | values) + "\n")
        self._file.flush()
        for report in self._reports:
            report.log(step, values)
        for name, (label, form) in _SHOWN.items():
            if name in values:
                self._show(**{label: form.format(values[name])})
        if self._bar.disable:
            shown = (f"{k} {v:,.0f}" if v >= 1000 else f"{k} {v:.4g}" for k, v in values.items())
            print(f"step {step}: " + ", ".join(shown), file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
        self._file.close()
        for report in self._reports:
            report.close()

    def _show(self, **values: str) -> None:
        self._shown |= values
        self._bar.set_postfix(self._shown, refresh=False)


class NoMetrics:
    """For ranks that do not report."""

    def advance(self, loss: float, planned_steps: float) -> None: ...

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def _lines_until(path: Path, last_step: int) -> list[str]:
    """The complete lines of steps up to `last_step`; a killed process, or machine, may have left half of one."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n") or json.loads(line)["step"] > last_step:
                break
        except ValueError:
            break
        kept.append(line.decode())
    return kept
