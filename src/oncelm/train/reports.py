"""Where metrics are written beside metrics.jsonl: TensorBoard, Weights & Biases."""

from __future__ import annotations

import logging
import os
import uuid
from pathlib import Path
from typing import Any, Protocol

from oncelm.utils.files import atomic_file

logger = logging.getLogger(__name__)

REPORTS = ("tensorboard", "wandb")


class Report(Protocol):
    """Takes the values of a step."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def close(self) -> None: ...


def open_reports(names: tuple[str, ...], out: Path, start_step: int, settings: dict[str, Any]) -> list[Report]:
    """The reports of that name, for a run in `out` that starts, or goes on, after `start_step` steps.

    Raises:
        ImportError: wandb is asked for and not installed; without tensorboard, which is a default, there is a warning.
    """
    reports: list[Report] = []
    for name in names:
        if name == "wandb":
            reports.append(Wandb(out, start_step, settings))
            continue
        try:
            reports.append(TensorBoard(out / "tensorboard", start_step))
        except ImportError:
            logger.warning("tensorboard is not installed: curves go to metrics.jsonl only")
    return reports


class TensorBoard:
    """Scalars in a folder of event files; those of steps that are about to be done again are taken back."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of the project "oncelm" (or $WANDB_PROJECT), named as its folder; wandb's own variables choose the rest.

    A resumed run goes on with its own curves: its id is kept in `out/wandb_id`.
    """

    def __init__(self, out: Path, start_step: int, settings: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError("report wandb needs wandb: pip install 'oncelm[wandb]'") from error
        kept = out / "wandb_id"
        if not (start_step and kept.exists()):
            with atomic_file(kept) as temporary:
                temporary.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "oncelm"),
            name=out.name,
            id=kept.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(out),
            config=settings,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
