"""What a run will need, computed before it starts: parameters, memory of each process, steps and tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from oncelm.models.registry import FAMILIES, family, model_class
from oncelm.train.config import TrainConfig
from oncelm.train.crossbatch import describe_crossbatch
from oncelm.utils.memory import check_memory
from oncelm.utils.units import size


@dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        weights, gradients, optimizer: the process's part of them.
        gathered: the weights of one layer, and of what is outside of the layers, put together for computing.
        activations: kept for the backward pass of one forward pass, with `activation_checkpointing` as it is set, and
            the other way; None where the model's are not known.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int | None
    activations_otherwise: int | None

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.gathered + (self.activations or 0)


def check_model(model: PreTrainedModel, config: TrainConfig) -> None:
    """ValueError for a model that the settings cannot split."""
    kind = family(model.config)
    for setting in ("tensor_parallel", "context_parallel"):
        if getattr(config, setting) > 1 and setting not in kind.splits:
            those = " and ".join(other.title for other in map(model_class, FAMILIES) if setting in other.splits)
            raise ValueError(f"{setting} is for {those} models; this is a {type(model).__name__}: leave it at 1.")
    if config.tensor_parallel > 1:
        kind.tensor_plan(model.config, config.tensor_parallel)
    if config.context_parallel > 1:
        kind.context_past(model.config)


def estimate_memory(model: PreTrainedModel, config: TrainConfig, processes: int) -> Memory:
    """The memory of one of `processes`; kernels' own buffers and what an allocator cannot join come on top.

    Raises:
        ValueError: the settings do not divide among so many processes, or the model cannot be split so.
    """
    tensor, chunk = config.tensor_parallel, config.context_parallel
    if processes % (tensor * chunk):
        raise ValueError(
            f"tensor_parallel {tensor} times context_parallel {chunk} must divide the number of processes, {processes}."
        )
    check_model(model, config)
    sequences = config.sequences_of_each(processes // (tensor * chunk))
    parameters = sum(p.numel() for p in model.parameters())
    inner = sum(p.numel() for name, p in model.named_parameters() if ".layers." in f".{name}")
    state = 2 * parameters
    if config.optimizer == "muon":  # one number for each of a layer's matrices, not two
        outer = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
        state -= sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in outer)
    passes = -(-sequences // config.batch_size)
    unsummed = processes > 1 and passes > 1  # gradients of the whole model, until the last forward pass of a step
    element = 2 if config.dtype == "bfloat16" else 4
    gathered = 0
    if processes > 1:
        layers = getattr(model.config, "num_hidden_layers", 1)
        gathered = 2 * element * inner // layers // tensor + 4 * (parameters - inner) // tensor  # one ahead is gathered
    tokens = min(config.batch_size, sequences) * -(-config.seq_len // chunk)
    kept = [
        activation_bytes(
            model.config, tokens, config.dtype, tensor, checkpointing=checkpointing, compiled=config.compile
        )
        for checkpointing in (config.activation_checkpointing, not config.activation_checkpointing)
    ]
    gradients = 4 * parameters // processes + (4 * parameters // tensor if unsummed else 0)
    return Memory(4 * parameters // processes, gradients, 4 * state // processes, gathered, *kept)


def check_machine(model: PreTrainedModel, config: TrainConfig, processes: int, device: torch.device) -> None:
    """ValueError for a run of which one process would not fit this machine: a CPU's memory is eaten before it fails."""
    needed = estimate_memory(model, config, processes).total
    what = f"by estimate (--dry-run), batch_size {config.batch_size} with seq_len {config.seq_len}"
    check_memory(needed, what, device)


def activation_bytes(
    config: PreTrainedConfig, tokens: int, dtype: str, tensor_parallel: int, *, checkpointing: bool, compiled: bool
) -> int | None:
    """Bytes kept for the backward pass of one forward pass over `tokens` tokens; None for models not known.

    Of each layer and token: the residual stream before both of its parts (float32), their normalised inputs (in
    float32, and rounded), what mixes tokens, and four of the feed-forward width: what plain PyTorch keeps. A compiled
    layer of OnceLM computes the normalised inputs and one of the four again. With checkpointing: the input of each
    layer up to one, and that one's all. The loss of transformers' own models keeps the logits, as made and in float32.
    """
    kind = family(config)
    kept_numbers = kind.kept_numbers(config)
    if kept_numbers is None:
        return None
    mixing, outside = kept_numbers
    d, f, e = config.hidden_size, config.intermediate_size, 2 if dtype == "bfloat16" else 4
    recomputes = compiled and kind.can_compile
    normalised = 0 if recomputes else e * 2 * d + (8 * d if e == 2 else 0)
    widths = 3 if recomputes else 4
    layers = [8 * d + normalised + e * ((inner + widths * f) // tensor_parallel) for inner in mixing]
    embeddings = 4 * d + 4 * d + e * d  # the stream's start; the last norm's input and output
    logits = 0 if kind.has_fused_loss else (e + 4) * config.vocab_size
    if checkpointing:  # the backward pass comes to a layer when the inputs of those behind it are gone
        kept = max(4 * d * number + layer for number, layer in enumerate(layers, start=1))
    else:
        kept = sum(layers)
    return tokens * (kept + embeddings + e * outside + logits)


def describe_plan(config: TrainConfig, model: PreTrainedModel, data: str, processes: int) -> str:
    """All of it as text; `model` may be on the meta device."""
    memory = estimate_memory(model, config, processes)
    parameters = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    output = model.get_output_embeddings()
    tied = output is None or output.weight is model.get_input_embeddings().weight
    without = parameters - embedding - (0 if tied else output.weight.numel())
    steps = f"{config.steps:,}" if config.steps else "as many as fit"
    limit = f", at most {config.max_seconds:g} s" if config.max_seconds else ""
    total = f" ({config.steps * config.tokens_per_step:,} tokens)" if config.steps else ""
    lines = [
        ("data", data),
        ("parameters", f"{parameters:,} ({without:,} without embeddings)"),
        *(describe_crossbatch(config, model.config) if config.crossbatch_rows is not None else ()),
        ("tokens per step", f"{config.tokens_per_step:,}"),
        ("steps", f"{steps}{limit}{total}"),
        ("processes", f"{processes}"),
        ("memory", f"about {size(memory.total)} each:"),
        ("  weights", size(memory.weights)),
        ("  gradients", size(memory.gradients)),
        ("  optimizer", size(memory.optimizer)),
    ]
    if memory.gathered:
        lines.append(("  gathered", size(memory.gathered)))
    if memory.activations is not None and memory.activations_otherwise is not None:
        other = "without" if config.activation_checkpointing else "with"
        lines.append(
            (
                "  activations",
                f"{size(memory.activations)} ({size(memory.activations_otherwise)} {other} checkpointing)",
            )
        )
    return "\n".join(f"{name:<16} {value}" for name, value in lines)
