"""The settings of a training run: one frozen dataclass, checked when it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Self

import yaml

from oncelm.train.recipe import check_names, override, read_recipe
from oncelm.train.reports import REPORTS
from oncelm.train.schedule import SCHEDULES
from oncelm.utils.constraints import (
    LARGEST,
    Count,
    Each,
    Fraction,
    Keyed,
    Name,
    Number,
    OneOf,
    Positive,
    Whole,
    check_all,
    constraints_of,
)
from oncelm.utils.vocabulary import bpe_size

OPTIMIZERS, DTYPES = ("adamw", "muon"), ("float32", "bfloat16")
MOST_TOKENS = 2**28  # in a step: more than any published run has, and 2 GiB of ids
Task = Annotated[str, OneOf(("pretrain", "sft"))]
Overrides = Annotated[dict[str, Any], Keyed()]
HeldOut = Annotated[float, Number(0, 0.5)]
Schedule = Annotated[str, OneOf(SCHEDULES)]
Decay = Annotated[float, Number(0, 1, open_low=True)]
Betas = Annotated[tuple[float, float], Each(Number(0, 1, open_high=True), count=2, kind=tuple)]
Reports = Annotated[tuple[str, ...], Each(OneOf(REPORTS), kind=tuple)]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every setting of a run. A wrong type or value is a ValueError that names the setting."""

    data: Name  # text (a file, a folder, a corpus with json/train.json) or the folder of prepared tokens
    task: Task = "pretrain"  # or "sft": data holds conversations (.jsonl), of which the assistant's tokens are learned
    out: Name  # the run's folder: metrics, checkpoints and, at the end, the model
    tokenizer: Name | None = None  # "bytes", "cl100k_base", "bpe:4096" (trained on the data) or a path;
    #                               None: the model folder's own, or "bytes" for a preset
    model: Name = "yoco-tiny"  # a preset, or the folder of a model to start from
    model_overrides: Overrides = field(default_factory=dict)  # keys that replace the preset's or folder's
    tokens: Name | None = None  # where the text's tokens are kept; None: .oncelm beside the text
    bos: bool = False  # start every document with the tokenizer's bos token
    validation_fraction: HeldOut = 0.05  # of the data, from its end, never trained on; unused with a json/valid.json
    document_masking: bool = False  # attend within documents only, though several are packed into a sequence
    long_documents: Count | None = None  # documents of so many tokens are seen `long_factor` times as often
    long_factor: Annotated[float, Number(0, 1e6, open_low=True)] = 1.0
    min_tokens: Count | None = None  # documents of fewer tokens are left out

    seq_len: Annotated[int, Whole(2)] = 512  # tokens in a sequence
    batch_size: Count = 8  # sequences in one forward pass of one process, at most; with crossbatch_rows, exactly
    grad_accumulation: Count = 1  # a step is this many times batch_size sequences, however many processes share them
    crossbatch_rows: Count | None = None  # LongLLaMA's crossbatch: rows in a row that hold one piece of a document
    steps: Count | None = 1000  # optimizer steps; None: until max_seconds
    max_seconds: Positive | None = None  # stop here too, the schedule shortened to fit
    target_loss: Positive | None = None  # stop here too: once an evaluation's validation loss is no more than this

    lr: Positive = 1e-3
    min_lr_ratio: Fraction = 0.1  # the learning rate at the end, as a share of lr
    min_lr: Annotated[float | None, Number(0)] = None  # the learning rate at the end itself; None: min_lr_ratio says it
    warmup_steps: Annotated[int, Whole(0)] = 50
    schedule: Schedule = "cosine"  # or "linear", "polynomial", "warmup_stable_decay", "constant"
    schedule_steps: Count | None = None  # where the schedule ends; None: with the run. More than steps: stopped early
    power: Positive = 1.0  # of schedule "polynomial"
    decay_fraction: Decay = (
        0.2  # of the steps behind the warm-up, their last ones, that "warmup_stable_decay" decays in
    )
    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = "adamw"  # or "muon", for the matrices of the layers
    momentum: Fraction = 0.95  # of "muon"
    betas: Betas = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Number(0)] = 0.1  # of matrices; not of embeddings, norms and biases
    grad_clip: Positive | None = 1.0  # largest gradient norm; None: not clipped

    seed: Annotated[int, Whole(0)] = 0
    dtype: Annotated[str, OneOf(DTYPES)] = "float32"  # of the computation; weights and optimizer are always float32
    device: Name = "auto"
    compile: bool = False  # the layers, by torch.compile: a GPU's steps get much faster, the first one takes a minute

    tensor_parallel: Count = 1  # processes that split each layer's heads and units
    context_parallel: Count = 1  # processes that split each sequence; all others split the sequences of a step
    activation_checkpointing: bool = False  # compute layers again in the backward pass instead of keeping activations

    log_every: Count = 10  # steps between lines in metrics.jsonl
    eval_every: Count | None = 200  # steps between evaluations; None: only at the end
    eval_batches: Count = 20  # held-out batches in one evaluation, at most
    save_every: Count | None = 500  # steps between checkpoints; None: only at the end
    report: Reports = ("tensorboard",)  # beside metrics.jsonl; also "wandb"
    peak_tflops: Positive | None = None  # of one device, for MFU; None: as known of GPUs in bfloat16
    keep_checkpoints: Count = 2  # the newest ones kept
    resume: bool = False  # continue from the newest intact checkpoint in `out`, if there is one

    def __new__(cls, **settings: Any) -> Self:
        check_names(settings, CONSTRAINTS)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        values = {name: _as_meant(name, getattr(self, name)) for name in CONSTRAINTS}
        for name, value in check_all(values, CONSTRAINTS).items():
            object.__setattr__(self, name, value)
        if self.min_lr is not None and self.min_lr > self.lr:
            raise ValueError(f"min_lr must be from 0 to lr = {self.lr}, got {self.min_lr!r}.")
        if self.tokens_per_step > MOST_TOKENS:
            raise ValueError(
                f"batch_size {self.batch_size} times grad_accumulation {self.grad_accumulation} times seq_len "
                f"{self.seq_len} are {self.tokens_per_step:,} tokens in one step; at most {MOST_TOKENS:,} are allowed."
            )
        if self.task == "sft" and self.long_documents is not None:
            raise ValueError('long_documents is for task "pretrain": conversations are all seen alike.')
        if self.task == "sft" and self.min_tokens is not None:
            raise ValueError('min_tokens is for task "pretrain": conversations are all kept.')
        self._check_crossbatch()
        if self.task == "sft" and self.tokenizer is not None and self.tokenizer.startswith("bpe:"):
            raise ValueError(
                f"tokenizer {self.tokenizer!r} is made from text; name the one that the model was made with."
            )
        if self.steps is None and self.max_seconds is None:
            raise ValueError("steps and max_seconds are both None: the run would not end; set one of them.")
        if self.target_loss is not None and self.eval_every is None:
            raise ValueError("target_loss is looked at in evaluations, and eval_every is None; set it too.")
        if self.compile and self.tensor_parallel > 1:
            raise ValueError("compile does not go with tensor_parallel: torch's compiler fails on its DTensors.")
        if self.tokenizer is not None:
            bpe_size(self.tokenizer)

    def _check_crossbatch(self) -> None:
        """What crossbatch does not go with; `oncelm.train.crossbatch` looks at the model."""
        if self.crossbatch_rows is None:
            return
        if self.task == "sft":
            raise ValueError('crossbatch_rows is for task "pretrain": the rows of a conversation see no others.')
        if self.document_masking:
            raise ValueError(
                "crossbatch_rows does not go with document_masking: rows see each other's documents on purpose."
            )
        for name in ("tensor_parallel", "context_parallel"):
            if getattr(self, name) > 1:
                raise ValueError(f"crossbatch_rows does not go with {name}, which is for YOCO models; leave it at 1.")
        if self.batch_size % self.crossbatch_rows:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by crossbatch_rows {self.crossbatch_rows}: the rows of "
                "one piece of a document see each other, so they are in one forward pass; try "
                f"{-(-self.batch_size // self.crossbatch_rows)} times {self.crossbatch_rows}."
            )
        if self.model_overrides.get("dataset_packing", self.crossbatch_rows) != self.crossbatch_rows:
            raise ValueError(
                f"model_overrides.dataset_packing {self.model_overrides['dataset_packing']} contradicts "
                f"crossbatch_rows {self.crossbatch_rows}, which sets it; leave it out."
            )

    @property
    def end_lr_ratio(self) -> float:
        """The learning rate at the end of the schedule, as a share of lr."""
        return self.min_lr_ratio if self.min_lr is None else self.min_lr / self.lr

    @property
    def masks_documents(self) -> bool:
        """Whether a packed row's documents, or conversations, attend to themselves only."""
        return self.document_masking or self.task == "sft"

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.grad_accumulation

    @property
    def tokens_per_step(self) -> int:
        return self.sequences_per_step * self.seq_len

    def sequences_of_each(self, processes: int) -> int:
        """The sequences of a step that each of the processes that share them takes.

        Raises:
            ValueError: they do not divide; or with crossbatch_rows, a process would not get whole forward passes.
        """
        if self.crossbatch_rows is not None and self.grad_accumulation % processes:
            raise ValueError(
                "with crossbatch_rows the rows of a forward pass see each other, so each process takes whole ones: the "
                f"{self.grad_accumulation} of a step (grad_accumulation) do not divide among {processes} processes; "
                f"try a multiple, with a smaller batch_size."
            )
        if self.sequences_per_step % processes:
            raise ValueError(
                f"the {self.sequences_per_step} sequences of a step (batch_size {self.batch_size} times "
                f"grad_accumulation {self.grad_accumulation}) do not divide among {processes} processes; change one "
                "of these numbers, or split each sequence as well (context_parallel)."
            )
        return self.sequences_per_step // processes

    def planned_steps(self, step: int, seconds: float) -> float:
        """Steps the whole run will take, `step` of them done in `seconds`: `steps`, or fewer where
        `max_seconds` ends it first at the pace so far (infinite while the pace is unknown)."""
        by_count = math.inf if self.steps is None else self.steps
        if self.max_seconds is None or step == 0:
            return by_count
        return min(by_count, step * self.max_seconds / seconds)

    @classmethod
    def from_yaml(cls, recipe: str | Path | None, overrides: Iterable[str] = (), **values: Any) -> TrainConfig:
        """The settings of a recipe, replaced by `values`, replaced by `overrides` ("key=value").

        Without `out` it is `default_out(data)`.

        Args:
            recipe: a YAML file; None for none.
            overrides: a dotted key reaches into a dictionary: `model_overrides.window_size=256`.
        """
        merged = override(({} if recipe is None else read_recipe(recipe)) | values, overrides)
        check_names(merged, CONSTRAINTS)
        if merged.get("data") is None:
            raise ValueError("data is missing; give it on the command line or in the recipe.")
        if merged.get("out") is None:
            merged["out"] = default_out(str(merged["data"]))
        return cls(**merged)

    def to_yaml(self) -> str:
        """The settings as a recipe that `from_yaml` reads back."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False)


CONSTRAINTS = constraints_of(TrainConfig)


def default_out(data: str) -> str:
    """The folder of a run that names none: runs/books for books/ and books.txt."""
    return str(Path("runs", Path(data).absolute().stem))


def _as_meant(name: str, value: Any) -> Any:
    """1e4 where a whole number is asked for, and 1 where a number with a fraction is, in that type."""
    if isinstance(CONSTRAINTS[name], Whole) and isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(CONSTRAINTS[name], Number) and type(value) is int and abs(value) < LARGEST:
        return float(value)
    return value
