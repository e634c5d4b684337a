"""The training loop: on one rank or many, exactly resumable.

    step s:  batch(s) -> loss, gradients -> clip -> optimizer at lr(s)         then, when due: log, evaluate, save

A step depends on the weights, the optimizer's state and s, and on nothing else: batch, learning rate and random
numbers are functions of s. Weights and state are in a checkpoint, so a resumed run repeats the losses of an
uninterrupted one: on a CPU and as many ranks, bit for bit. (`max_seconds` is the exception: with it the learning rate
follows the clock.)

A step's batch is the same on any number of ranks (`oncelm.train.parallel`): each takes its rows, or its part of them.
"""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from oncelm.data.batch import TrainBatch, TrainData
from oncelm.data.read_ahead import ReadAhead
from oncelm.models.inputs import NOTHING
from oncelm.models.load import load, quiet_transformers
from oncelm.models.registry import family
from oncelm.train.checkpoint import FOLDER, check_new, find_checkpoint, list_checkpoints
from oncelm.train.claim import claim, run_lock
from oncelm.train.config import TrainConfig
from oncelm.train.crossbatch import check_crossbatch
from oncelm.train.diagnose import first_not_finite
from oncelm.train.interrupt import StopRequest
from oncelm.train.metrics import Metrics, NoMetrics
from oncelm.train.optimizer import build_optimizers
from oncelm.train.parallel.context import chunk_inputs
from oncelm.train.parallel.mesh import Mesh
from oncelm.train.parallel.shard import keep_on_host, prepare_model
from oncelm.train.reports import open_reports
from oncelm.train.resume import warn_of_changes
from oncelm.train.saving import Saver, read_tensors, tensors_to_save
from oncelm.train.schedule import lr_factor
from oncelm.train.throughput import ThroughputMeter
from oncelm.utils.checksums import write_checksums
from oncelm.utils.device import resolve_device
from oncelm.utils.errors import renamed
from oncelm.utils.files import atomic_file, atomic_folder, clean_up

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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
        dataset: where batches come from; read ahead by a thread.
        config: the run.
        tokenizer: saved beside the model in every checkpoint and at the end.
        mesh: this process's place among those that train together (`join_mesh`); None means it is alone. The first
            rank's model counts; the others' may be without values, on the meta device.
        data_digest: a checksum of what `dataset` was made from, kept in checkpoints; a run that is resumed with another
            one warns. None: not compared.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dataset: TrainData,
        config: TrainConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        mesh: Mesh | None = None,
        data_digest: str | None = None,
    ) -> None:
        self.mesh = mesh or Mesh(resolve_device(None if config.device == "auto" else config.device))
        config.sequences_of_each(self.mesh.data.size)  # or a ValueError, before anything large happens
        check_crossbatch(config, model.config)
        self.model = prepare_model(model, config, self.mesh)
        self.dataset, self.config, self.tokenizer, self.data_digest = dataset, config, tokenizer, data_digest
        self.optimizers = build_optimizers(self.model, config)
        self.out = Path(config.out)
        self.checkpoints = self.out / FOLDER
        self.export_request = self.out / "export"  # a file that asks for an export behind the next step
        self.finished_mark = self.out / "finished"  # a file that is there once the run is over: `model` may be earlier
        self.saver = Saver(self.checkpoints, config.keep_checkpoints, self.mesh)
        self.meter = ThroughputMeter(self.model.config, config, self.mesh)
        self.step = 0  # optimizer steps done
        self.seconds = 0.0  # the run has taken, earlier parts included

    def train(self) -> TrainResult:
        """Train to the end, or until SIGTERM or Ctrl-C, which saves a checkpoint and returns.

        A file `out/export` asks for an export behind the step that is being computed; it is deleted then. A file
        `out/finished` is there once the run has come to its end, until one with more steps resumes it.

        Raises:
            ValueError: another run is writing to `out`, or has.
            FloatingPointError: a loss or gradient is not finite.
            OSError: a checkpoint could not be written.
        """
        lock = run_lock(self.out)
        self.mesh.on_main(partial(claim, lock))
        try:
            return self._train()
        finally:
            lock.release()

    def fit(self) -> NoReturn:
        raise renamed("method", "Trainer.fit", "Trainer.train")

    def _train(self) -> TrainResult:
        self._start_or_resume()
        loss = validation_loss = model_path = None
        metrics: Metrics | NoMetrics = NoMetrics()
        if self.mesh.is_main:
            reports = open_reports(self.config.report, self.out, self.step, asdict(self.config))
            metrics = Metrics(self.out, self.step, reports)
        try:
            on_gpu = self.mesh.device.type == "cuda"
            with StopRequest() as stop, ReadAhead(self.dataset, pin_memory=on_gpu) as batches:
                stopping = False
                if self.step and self._due(self.config.eval_every) and self.config.target_loss is not None:
                    # it may have been stopped before it exported what it had learned
                    validation_loss = self.evaluate()
                learned = self._is_learned(validation_loss)
                started = time.perf_counter() - self.seconds
                while not (stopping or learned or self._finished()):
                    with self.meter.step():
                        step_values = self._train_step(batches)
                    loss = step_values["loss"]
                    seconds = time.perf_counter() - started
                    stopping, exporting, self.seconds = self.mesh.agree(
                        stop.requested or self.saver.failed,
                        self.mesh.is_main and self.export_request.exists(),
                        seconds,
                    )
                    metrics.advance(loss, self.config.planned_steps(self.step, self.seconds))
                    if self._due(self.config.log_every):
                        step_values |= {
                            "tokens": self.step * self.config.tokens_per_step,
                            "seconds": self.seconds,
                        }
                        metrics.log(self.step, step_values | self.meter.take())
                    if self._due(self.config.eval_every) and not self._finished():
                        validation_loss = self._log_validation(metrics)
                        learned = self._is_learned(validation_loss)
                    if self._due(self.config.save_every) and not self._finished():
                        self.save()
                    if exporting:
                        folder = self.export()
                        self.mesh.on_main(partial(self.export_request.unlink, missing_ok=True))
                        logger.warning("exported step %d to %s", self.step, folder)
                if stopping:
                    validation_loss = None
                    self.save()
                else:
                    if not learned:  # before the last save: one that is not finite must not push out a good checkpoint
                        validation_loss = self._log_validation(metrics)
                    model_path = self.export()
                    self.mesh.on_main(self.finished_mark.touch)
                self.saver.wait()
        finally:
            metrics.close()
        tokens = self.step * self.config.tokens_per_step
        return TrainResult(
            self.step, self.seconds, tokens, loss, validation_loss, model_path, interrupted=model_path is None
        )

    def _train_step(self, batches: ReadAhead) -> dict[str, float]:
        """One optimizer step; returns its loss, learning rate and gradient norm (before clipping)."""
        config = self.config
        factor = lr_factor(
            self.step,
            config.schedule_steps or config.planned_steps(self.step, self.seconds),
            schedule=config.schedule,
            warmup_steps=config.warmup_steps,
            min_lr_ratio=config.end_lr_ratio,
            power=config.power,
            decay_fraction=config.decay_fraction,
        )
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * factor

        self.model.train()
        self._seed_step()
        total = torch.zeros((), device=self.mesh.device)
        count = config.sequences_per_step
        with self.meter.waiting():
            targets = batches.num_targets(self.step, count)
            batch = batches.batch(self.step, count, self.mesh.rows(count))
        if config.masks_documents and batch.lengths is None:
            raise ValueError("document_masking is set, but not of the data, which does not say where documents begin.")
        # Losses are summed over tokens and ranks, and FSDP takes the mean of gradients over ranks: both come out here.
        divisor = targets / self.mesh.shards
        parts = batch.split(config.batch_size)
        for part in parts:
            if isinstance(self.model, FSDPModule):  # gradients are summed over the ranks once a step
                self.model.set_requires_gradient_sync(part is parts[-1])
            loss = self._loss(part, divisor)
            loss.backward()
            total += loss.detach()
        total = self.mesh.sum(total) / self.mesh.shards
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        for name, value in (("loss", total.item()), ("gradient norm", norm.item())):
            if not math.isfinite(value):
                self._stop_not_finite(name, value, self.step + 1, self._find_not_finite())
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return {"loss": total.item(), "lr": config.lr * factor, "grad_norm": norm.item()}

    def _seed_step(self) -> None:
        """Random numbers (of dropout) that depend on the seed, the step, and which tokens a rank sees."""
        shard = self.mesh.world.index // self.mesh.tensor.size
        seed = np.random.SeedSequence([self.config.seed, self.step, shard]).generate_state(1, np.uint64)
        torch.manual_seed(int(seed[0]))

    def _loss(self, batch: TrainBatch, divisor: float) -> Tensor:
        """The loss of a forward pass, summed over this rank's targets, by `divisor`. Nothing waits for a GPU."""
        tokens, cu_seqlens = batch.tokens, batch.cu_seqlens
        labels = tokens if batch.labels is None else batch.labels
        if cu_seqlens is not None:
            tokens, labels = tokens.view(1, -1), labels.view(1, -1)
        inputs: dict[str, Any]
        if self.mesh.context.size > 1:
            assert self.mesh.context_group is not None
            inputs = chunk_inputs(self.model.config, self.mesh.context_group, tokens, labels, cu_seqlens)
        else:
            inputs = {"input_ids": tokens, "labels": labels}
            inputs |= {} if cu_seqlens is None else {"cu_seqlens": cu_seqlens}
        if family(self.model.config).takes_host_inputs:  # where what they ask for is known
            inputs = {name: keep_on_host(value, self.model) for name, value in inputs.items()}
            inputs["logits_to_keep"] = NOTHING  # in evaluation too
        else:
            inputs = {name: value.to(self.mesh.device, non_blocking=True) for name, value in inputs.items()}
        with torch.autocast(self.mesh.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16"):
            return self.model(**inputs, num_items_in_batch=divisor, use_cache=False).loss

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Mean loss over the first `eval_batches` held-out batches; None where nothing is held out."""
        self.model.eval()
        sums = torch.zeros(2, device=self.mesh.device, dtype=torch.float64)  # loss, targets
        batches = islice(self.dataset.validation_batches(self.config.batch_size), self.config.eval_batches)
        while turn := list(islice(batches, self.mesh.data.size)):  # a batch for each data-parallel rank
            # where the last ones run out, a rank computes one for nothing: sharded layers need all ranks
            mine = min(self.mesh.data.index, len(turn) - 1)
            loss = self._loss(turn[mine], 1.0)
            if mine == self.mesh.data.index:
                share = turn[mine].num_targets / self.mesh.context.size
                sums += torch.tensor([loss.item(), share], device=sums.device, dtype=sums.dtype)
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # the outermost parameters stay gathered until a backward pass
        total, targets = self.mesh.sum(sums).tolist()
        return total / targets if targets else None

    def _log_validation(self, metrics: Metrics | NoMetrics) -> float | None:
        loss = self.evaluate()
        if loss is not None:
            if not math.isfinite(loss):
                self._stop_not_finite("validation loss", loss, self.step)
            metrics.log(self.step, {"validation_loss": loss})
        return loss

    def _is_learned(self, validation_loss: float | None) -> bool:
        """Whether the run ends here by its `target_loss`: the first rank says so, another's last bit may differ."""
        target = self.config.target_loss
        if target is None or validation_loss is None:
            return False
        return self.mesh.on_main(lambda: validation_loss <= target)

    def save(self) -> Path:
        """Begin to write a checkpoint of this step, unless there is one, and return what will be its folder.

        `self.saver.wait()` returns once it is complete.
        """
        if self.saver.step != self.step:
            # as they are now: training goes on meanwhile
            state: dict[str, Any] = {"step": self.step, "seconds": self.seconds, "config": asdict(self.config)}
            state["data"] = self.data_digest
            self.saver.save(self.step, tensors_to_save(self.model, self.optimizers), partial(self._write_rest, state))
        return self.checkpoints / f"step-{self.step:06d}"

    def export(self) -> Path:
        """Write the model, and the tokenizer, as a Hugging Face folder `out/model`; returns it."""
        saved = self.save()
        self.saver.wait()

        def write() -> Path:
            # From the checkpoint: the first rank then needs no part of the model from any other.
            model = load(saved, device="cpu", verify=False)  # its checksums were taken a moment ago
            with atomic_folder(self.out / "model") as folder, quiet_transformers():
                model.save_pretrained(folder)
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(folder)
                write_checksums(folder)
            return self.out / "model"

        return self.mesh.on_main(write)

    def _write_rest(self, state: dict[str, Any], folder: Path) -> None:
        self.model.config.save_pretrained(folder)
        if self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        (folder / "trainer.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    def _start_or_resume(self) -> None:
        folder = self.mesh.on_main(self._choose_start)
        if folder is not None:
            self._resume(folder)
        # not before: settings that a checkpoint does not fit must not take the place of those it was made with
        self.mesh.on_main(self._begin)

    def _choose_start(self) -> Path | None:
        """Make the run's folder ready; the checkpoint to start from, or None. For the first rank alone."""
        clean_up(self.out)
        clean_up(self.checkpoints)
        if not self.config.resume:
            check_new(self.out)
        return find_checkpoint(self.checkpoints) if self.config.resume else None

    def _begin(self) -> None:
        """Mark the folder as that of a run with these settings that is not finished. For the first rank alone."""
        self.finished_mark.unlink(missing_ok=True)
        with atomic_file(self.out / "config.yaml") as temporary:
            temporary.write_text(self.config.to_yaml(), encoding="utf-8")

    def _resume(self, folder: Path) -> None:
        # Checksums matched: what fails from here on is another model's checkpoint, not a damaged one.
        state = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
        read_tensors(folder, tensors_to_save(self.model, self.optimizers), self.mesh)
        self.step, self.seconds = state["step"], state["seconds"]
        self.saver.step = self.step
        warn_of_changes(folder, state, self.config, self.data_digest)

    def _finished(self) -> bool:
        out_of_time = self.config.max_seconds is not None and self.seconds >= self.config.max_seconds
        return out_of_time or (self.config.steps is not None and self.step >= self.config.steps)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _find_not_finite(self) -> str:
        """Where in this step, which is computed once more, and in which sequences: a sentence. All ranks call it."""
        self.model.zero_grad(set_to_none=True)
        if family(self.model.config).can_compile:
            self.model.compile_layers(False)  # compiled modules have no outputs to look at
        self._seed_step()
        count, size = self.config.sequences_per_step, self.config.batch_size
        mine = self.mesh.rows(count)
        passes = []
        for number, part in enumerate(self.dataset.batch(self.step, count, mine).split(size)):
            first = mine.start + number * size
            rows = range(first, first + len(part.tokens))
            names = [f"{row} ({self.dataset.describe(self.step * count + row)})" for row in rows]
            sequences = f"sequence{'s' * (len(names) > 1)} {', '.join(names)} of the step"
            passes.append((partial(self._loss, part, 1.0), sequences))
        return first_not_finite(self.model, passes, self.mesh)

    def _stop_not_finite(self, name: str, value: float, step: int, where: str | None = None) -> NoReturn:
        self.saver.wait()
        kept = list_checkpoints(self.checkpoints)
        last = f"the last checkpoint is {kept[-1][1]}" if kept else "no checkpoint had been saved"
        place = "" if where is None else f"{where}; "
        raise FloatingPointError(
            f"{name} is {value} at step {step}; {place}{last}. A lower lr or more warmup_steps may help."
        )
