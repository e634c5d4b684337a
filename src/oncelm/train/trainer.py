"""The training loop: one process, one device, exactly resumable.

    step s:  batch(s) -> loss, gradients -> clip -> AdamW at lr(s)         then, when due: log, evaluate, save

A step depends on the weights, the optimizer's state, the random state and s, and on nothing else. All four
are in a checkpoint, so a resumed run repeats the losses of an uninterrupted one: on a CPU, bit for bit.
(`max_seconds` is the exception: with it the learning rate follows the clock.)
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from oncelm.train.checkpoint import (
    delete_unfinished,
    find_checkpoint,
    list_checkpoints,
    save_checkpoint,
)
from oncelm.train.config import TrainConfig
from oncelm.train.interrupt import StopRequest
from oncelm.train.metrics import Metrics
from oncelm.train.optimizer import build_optimizer
from oncelm.train.schedule import lr_factor
from oncelm.utils.device import resolve_device
from oncelm.utils.files import atomic_file, atomic_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Settings that say where a run is, how long it lasts and what it reports: free to change on resume.
_FREE_TO_CHANGE = {
    *("out", "steps", "max_seconds", "device", "compile", "resume"),
    *("log_every", "eval_every", "eval_batches", "save_every", "keep_checkpoints"),
}


class Batches(Protocol):
    """What the trainer asks of its data; `oncelm.data.dataset.TokenDataset` is one."""

    def batch(self, step: int, batch_size: int) -> Tensor:
        """int64 [B, T], the same for the same step whatever was asked before."""

    def validation_batches(self, batch_size: int) -> Iterator[Tensor]:
        """int64 [B, T] each, always the same ones in the same order; possibly none."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: `step` steps done in `seconds`, earlier parts of a resumed run included."""

    step: int
    seconds: float
    tokens: int  # seen in training
    loss: float | None  # of the last step of this call; None when there was nothing left to do
    validation_loss: float | None  # at the end; None without held-out data or when interrupted
    model_path: Path | None  # the exported model; None when interrupted
    interrupted: bool  # by SIGTERM or Ctrl-C; `resume` goes on from here


class Trainer:
    """Trains any Hugging Face-style causal language model: `model(input_ids=..., labels=...).loss`.

    Args:
        model: its weights are trained in float32, in place, whatever dtype they come in.
        dataset: where batches come from.
        config: the run.
        tokenizer: saved beside the model in every checkpoint and at the end.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dataset: Batches,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.device = resolve_device(None if config.device == "auto" else config.device)
        self.model = model.float().to(self.device)
        if config.compile:
            getattr(model, "compile_layers", model.compile)()
        self.dataset, self.config, self.tokenizer = dataset, config, tokenizer
        self.optimizer = build_optimizer(model, config)
        self.out = Path(config.out)
        self.checkpoints = self.out / "checkpoints"
        self.step = 0  # optimizer steps done
        self.seconds = 0.0  # the run has taken, earlier parts included
        self._saved_step: int | None = None

    def fit(self) -> TrainResult:
        """Train to the end, or until SIGTERM or Ctrl-C, which saves a checkpoint and returns."""
        self._start_or_resume()
        loss = validation_loss = model_path = None
        metrics = Metrics(self.out, self.step)
        try:
            with StopRequest() as stop:
                started = time.perf_counter() - self.seconds
                window_seconds, window_tokens = 0.0, 0  # since the last log, in training steps alone
                while not stop.requested and not self._finished():
                    before = time.perf_counter()
                    step_values = self._train_step()
                    loss = step_values["loss"]
                    now = time.perf_counter()
                    self.seconds = now - started
                    window_seconds += now - before
                    window_tokens += self.config.tokens_per_step
                    metrics.advance(loss, self.config.planned_steps(self.step, self.seconds))
                    if self._due(self.config.log_every):
                        step_values |= {
                            "tokens": self.step * self.config.tokens_per_step,
                            "tokens_per_second": window_tokens / window_seconds,
                            "seconds": self.seconds,
                        }
                        metrics.log(self.step, step_values)
                        window_seconds, window_tokens = 0.0, 0
                    if self._due(self.config.eval_every) and not self._finished():
                        self._log_validation(metrics)
                    if self._due(self.config.save_every):
                        self.save()
                self.save()
                if not stop.requested:
                    validation_loss = self._log_validation(metrics)
                    model_path = self.export()
        finally:
            metrics.close()
        tokens = self.step * self.config.tokens_per_step
        return TrainResult(
            self.step, self.seconds, tokens, loss, validation_loss, model_path, interrupted=model_path is None
        )

    def _train_step(self) -> dict[str, float]:
        """One optimizer step; returns its loss, learning rate and gradient norm (before clipping)."""
        config = self.config
        factor = lr_factor(
            self.step,
            config.planned_steps(self.step, self.seconds),
            schedule=config.schedule,
            warmup_steps=config.warmup_steps,
            min_lr_ratio=config.min_lr_ratio,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * factor

        self.model.train()
        total = torch.zeros((), device=self.device)
        batch = self.dataset.batch(self.step, config.sequences_per_step)
        for part in batch.split(config.batch_size):
            # Parts have equally many targets, so the mean of their means is the mean over the step.
            loss = self._loss(part) / config.grad_accumulation
            loss.backward()
            total += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        self._check_finite("loss", total.item(), self.step + 1)
        self._check_finite("gradient norm", norm.item(), self.step + 1)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": total.item(), "lr": config.lr * factor, "grad_norm": norm.item()}

    def _loss(self, batch: Tensor) -> Tensor:
        tokens = batch.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return self.model(input_ids=tokens, labels=tokens, use_cache=False).loss

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Mean loss over the first `eval_batches` held-out batches; None where nothing is held out."""
        self.model.eval()
        total, rows = 0.0, 0
        batches = self.dataset.validation_batches(self.config.batch_size)
        for batch in islice(batches, self.config.eval_batches):
            total += self._loss(batch).item() * len(batch)
            rows += len(batch)
        return total / rows if rows else None

    def _log_validation(self, metrics: Metrics) -> float | None:
        loss = self.evaluate()
        if loss is not None:
            self._check_finite("validation loss", loss, self.step)
            metrics.log(self.step, {"validation_loss": loss})
        return loss

    def save(self) -> Path:
        """Write a checkpoint of this step, unless there is one, and return its folder."""
        if self._saved_step != self.step:
            save_checkpoint(self.checkpoints, self.step, self._write_state, keep=self.config.keep_checkpoints)
            self._saved_step = self.step
        return self.checkpoints / f"step-{self.step:06d}"

    def export(self) -> Path:
        """Write the model, and the tokenizer, as a Hugging Face folder `out/model`; returns it."""
        target = self.out / "model"
        with atomic_folder(target) as folder:
            self.model.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder)
        return target

    def _start_or_resume(self) -> None:
        delete_unfinished(self.checkpoints)
        if self.config.resume and (folder := find_checkpoint(self.checkpoints)):
            self._read_state(folder)
        elif list_checkpoints(self.checkpoints):
            raise ValueError(
                f"out {str(self.out)!r} already holds checkpoints; resume that run (--resume) or choose another folder."
            )
        else:
            torch.manual_seed(self.config.seed)
        with atomic_file(self.out / "config.yaml") as temporary:
            temporary.write_text(self.config.to_yaml(), encoding="utf-8")

    def _write_state(self, folder: Path) -> None:
        save_model(self.model, str(folder / "model.safetensors"), metadata={"format": "pt"})
        self.model.config.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "config": asdict(self.config),
            "optimizer": self.optimizer.state_dict()["state"],
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),  # empty without a GPU
        }
        torch.save(state, folder / "trainer.pt")

    def _read_state(self, folder: Path) -> None:
        # Checksums matched: what fails from here on is another model's checkpoint, not a damaged one.
        state: dict[str, Any] = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        try:
            load_model(self.model, folder / "model.safetensors")
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"checkpoint {folder} does not fit the model given: {reason}") from None
        # Learning rate, betas and decay stay the config's; only what was learned comes from the checkpoint.
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["optimizer"], "param_groups": groups})
        torch.set_rng_state(state["cpu_rng"])
        if self.device.type == "cuda" and len(state["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.step, self.seconds = state["step"], state["seconds"]
        self._saved_step = self.step
        for name, value in asdict(self.config).items():
            if name not in _FREE_TO_CHANGE and state["config"].get(name) != value:
                before = state["config"].get(name)
                logger.warning("resuming %s with another %s: %r, was %r", folder, name, value, before)

    def _finished(self) -> bool:
        out_of_time = self.config.max_seconds is not None and self.seconds >= self.config.max_seconds
        return out_of_time or (self.config.steps is not None and self.step >= self.config.steps)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _check_finite(self, name: str, value: float, step: int) -> None:
        if not math.isfinite(value):
            kept = list_checkpoints(self.checkpoints)
            last = f"the last checkpoint is {kept[-1][1]}" if kept else "no checkpoint had been saved"
            raise FloatingPointError(
                f"{name} is {value} at step {step}; {last}. A lower lr or more warmup_steps may help."
            )
