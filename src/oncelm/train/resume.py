"""Resuming a run: which settings may differ from before, and which differences cause a warning."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from oncelm.train.config import TrainConfig
from oncelm.train.recipe import with_new_names

logger = logging.getLogger(__name__)

# Settings that say where a run is, how long it lasts and what it reports: free to change on resume.
FREE_TO_CHANGE = {
    *("out", "steps", "max_seconds", "target_loss", "device", "compile", "resume", "tokens"),
    *("tensor_parallel", "context_parallel", "activation_checkpointing"),
    *("log_every", "eval_every", "eval_batches", "save_every", "keep_checkpoints", "report", "peak_tflops"),
}


def warn_of_changes(checkpoint: Path, state: dict[str, Any], config: TrainConfig, data_digest: str | None) -> None:
    """Warn of settings and data that are not those of a checkpoint; batches and losses then are not, either.

    Args:
        state: what the checkpoint's trainer.json holds.
        data_digest: a checksum of the data; None: not compared.
    """
    if None not in (data_digest, state.get("data")) and state["data"] != data_digest:
        logger.warning(
            "resuming %s on other data: %r has changed; batches and held-out text are not those of before",
            *(checkpoint, config.data),
        )
    now = json.loads(json.dumps(asdict(config)))  # as the checkpoint's went through JSON
    before = with_new_names(state["config"])
    for name, value in now.items():
        if name not in FREE_TO_CHANGE and before.get(name) != value:
            logger.warning("resuming %s with another %s: %r, was %r", checkpoint, name, value, before.get(name))
