"""What single ranks do in the tests beside this file: functions that a process can be told to run."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from oncelm.data.conversations import Conversation, ConversationDataset
from oncelm.data.crossbatch import CrossbatchDataset, sequence_tokens
from oncelm.data.dataset import TokenDataset
from oncelm.data.read_ahead import ReadAhead
from oncelm.models.longllama import LongLlamaConfig, LongLlamaForCausalLM
from oncelm.models.yoco import YocoConfig, YocoForCausalLM
from oncelm.models.yoco.model import FeedForward
from oncelm.train.config import TrainConfig
from oncelm.train.parallel.context import chunk_inputs
from oncelm.train.parallel.mesh import join_mesh
from oncelm.train.parallel.shard import shard_model
from oncelm.train.trainer import Trainer

SHAPE = {
    **{"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_self_decoder_layers": 2},
    **{"num_cross_decoder_layers": 2, "num_self_heads": 4, "num_attention_heads": 8, "num_key_value_heads": 2},
}

running: list[Trainer] = []  # of this process, for events that reach into it


def make_model(dtype: torch.dtype = torch.float64, llama: bool = False, **options) -> PreTrainedModel:
    """A YOCO, a Llama, or a LongLLaMA where options name `mem_layers`."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    if "mem_layers" in options:
        return LongLlamaForCausalLM(LongLlamaConfig(**(sizes | options))).to(dtype)
    if llama:
        return LlamaForCausalLM(LlamaConfig(**(sizes | options))).to(dtype)
    return YocoForCausalLM(YocoConfig(**(SHAPE | options))).to(dtype)


def make_tokens(rows: int, length: int) -> torch.Tensor:
    return torch.randint(32, (rows, length), generator=torch.Generator().manual_seed(1))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradients of all parameters, in full."""
    return {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for name, p in model.named_parameters()
    }


def one_rank(tokens: torch.Tensor, labels: torch.Tensor, options: dict, **inputs) -> tuple[float, dict]:
    """Loss and gradients without any parallelism: what the cases below must equal."""
    model = make_model(**options)
    loss = model(input_ids=tokens, labels=labels, **inputs).loss
    loss.backward()
    return loss.item(), gradients(model)


def in_chunks(tokens: torch.Tensor, labels: torch.Tensor, options: dict, cu_seqlens=None, checkpoint=False):
    """Loss and gradients with each row split over all ranks, summed over them."""
    size = int(os.environ["WORLD_SIZE"])
    with join_mesh("cpu", context=size) as mesh:
        model = make_model(**options)
        if checkpoint:
            model.train().gradient_checkpointing_enable()
        inputs = chunk_inputs(model.config, mesh.context_group, tokens, labels, cu_seqlens)
        count = (labels[:, 1:] != -100).sum() - (0 if cu_seqlens is None else len(cu_seqlens) - 2)
        loss = model(**inputs, num_items_in_batch=count).loss
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        return mesh.sum(loss.detach()).item(), gradients(model)


def sharded(tokens: torch.Tensor, labels: torch.Tensor, options: dict, tensor: int, chunk: int, dtype=torch.float32):
    """Loss and gradients of a model split over all ranks, and what clipping calls its norm."""
    with join_mesh("cpu", tensor=tensor, context=chunk) as mesh:
        model = make_model(torch.float32, **options)
        if not mesh.is_main:
            model.to("meta")
        shard_model(model, mesh, dtype)
        count = (labels[:, 1:] != -100).sum() / mesh.shards
        mine = mesh.rows(len(tokens))
        rows = tokens[mine], labels[mine]
        if chunk > 1:
            inputs = chunk_inputs(model.config, mesh.context_group, *rows)
        else:
            inputs = dict(zip(("input_ids", "labels"), rows, strict=True))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(**inputs, num_items_in_batch=count, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        optimizer.step()
        return mesh.sum(loss.detach()).item() / mesh.shards, gradients(model), norm.item()


def make_dataset(crossbatch_rows: int | None = None) -> TokenDataset | CrossbatchDataset:
    tokens = np.arange(1000, dtype=np.uint32) ** 2 % 31
    if crossbatch_rows is not None:
        return CrossbatchDataset(
            TokenDataset(tokens, seq_len=sequence_tokens(16, crossbatch_rows), seed=1), crossbatch_rows
        )
    return TokenDataset(tokens, seq_len=16, seed=1)


def make_conversations() -> ConversationDataset:
    random = np.random.default_rng(0)
    conversations = [
        Conversation(random.integers(31, size=length).astype(np.uint32), np.arange(length) >= length // 2, f"line {i}")
        for i, length in enumerate(random.integers(3, 14, size=80))
    ]
    return ConversationDataset(conversations, seq_len=16, seed=1)


def train(options: dict, shape: dict, rank: int = -1, step: int = 0, event: Callable[[], None] | None = None) -> str:
    """Train; rank `rank` does `event` when it asks for the batch of `step`. Returns how it ended, in a few words."""
    try:
        config = TrainConfig(**options)
        with (
            join_mesh("cpu", tensor=config.tensor_parallel, context=config.context_parallel) as mesh,
            pytest.MonkeyPatch.context() as patch,
        ):
            with torch.device("cpu" if mesh.is_main else "meta"):
                model = make_model(torch.float32, **shape)
            dataset = make_conversations() if config.task == "sft" else make_dataset(config.crossbatch_rows)
            if event is not None and mesh.world.index == rank:
                batch = ReadAhead.batch

                def eventful(self, asked, *rest):
                    if asked == step:
                        event()
                    return batch(self, asked, *rest)

                patch.setattr(ReadAhead, "batch", eventful)
            running.append(Trainer(model, dataset, config, mesh=mesh))
            result = running[-1].train()
    except (OSError, ValueError, FloatingPointError, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return f"{'stopped' if result.interrupted else 'ended'} at {result.step}"


def is_learned(options: dict, losses: list[float]) -> bool:
    """What the trainer makes of a validation loss, each rank of its own."""
    with join_mesh("cpu") as mesh:
        trainer = Trainer(make_model(), make_dataset(), TrainConfig(**options), mesh=mesh)
        return trainer._is_learned(losses[mesh.world.index])


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk() -> None:
    _at_step_4(_no_space)


def die_while_saving() -> None:
    _at_step_4(die)


def _no_space() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def _at_step_4(event: Callable[[], None]) -> None:
    """From now on `event` happens while the checkpoint of step 4 is written (the one before may not be ready yet)."""
    write_data = HuggingFaceStorageWriter.write_data

    def eventful(self, plan, planner):
        if "step-000004" in str(self.path):
            event()
        return write_data(self, plan, planner)

    HuggingFaceStorageWriter.write_data = eventful


def overflow() -> None:
    """From now on, on this rank, feed-forward layers give infinities."""
    forward = FeedForward.forward
    FeedForward.forward = lambda self, *inputs: forward(self, *inputs) * float("inf")


def spoil_weight() -> None:
    """This rank's part of one weight becomes infinite."""
    with torch.no_grad():
        running[-1].model.self_decoder.layers[0].ffn.fc2.weight.to_local().fill_(float("inf"))
