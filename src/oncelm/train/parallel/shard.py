"""Weights, gradients and optimizer state split over ranks: FSDP2, and tensor parallelism inside each shard.

    rank 0: the model, on the CPU  ──▶  all ranks: the model without values (meta)  ──▶  split  ──▶  values from rank 0

Values reach the others one tensor at a time, so only rank 0 ever has a full copy, in its host's memory; a rank may
hand in a model on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from oncelm.models.registry import family
from oncelm.train.config import TrainConfig
from oncelm.train.parallel.mesh import Mesh
from oncelm.train.parallel.tensor import split_layers
from oncelm.train.plan import check_model


def prepare_model(model: PreTrainedModel, config: TrainConfig, mesh: Mesh) -> PreTrainedModel:
    """`model`, or this rank's part of it, in float32 on this rank's device."""
    check_model(model, config)
    model.float()
    if config.activation_checkpointing:
        # renamed behind transformers 5.17
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if config.compile:
        (model.compile_layers if family(model.config).can_compile else model.compile)()
    if mesh.device_mesh is None:
        return model.to(mesh.device)
    shard_model(model, mesh, getattr(torch, config.dtype))
    return model


def shard_model(model: PreTrainedModel, mesh: Mesh, dtype: torch.dtype) -> None:
    """Split `model` over the ranks, in place, with the first rank's values.

    Layers are gathered in `dtype` when they are computed, and their gradients summed in float32. What is outside of
    them (embeddings, output projection, shared K/V projections) stays float32: autocast casts it where it is used, as
    on one GPU, and the residual stream starts in float32.
    """
    assert mesh.device_mesh is not None
    values = model.state_dict() if mesh.is_main else {}
    buffers = dict(model.named_buffers())  # those too that no state dict has
    model.to("meta")
    model.tie_weights()
    if mesh.tensor.size > 1:
        split_layers(model, mesh.device_mesh["tensor"])
    shard = mesh.device_mesh["shard"]
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=shard, mp_policy=narrow)
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    if embeddings.weight is not output.weight:
        fully_shard(embeddings, mesh=shard)
    fully_shard(model, mesh=shard)

    model.to_empty(device=mesh.device)
    model.tie_weights()
    set_model_state_dict(
        model, values, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=mesh.is_main)
    )
    for name, buffer in model.named_buffers():
        if mesh.is_main:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)
    model.register_forward_pre_hook(_from_host, with_kwargs=True)  # runs behind FSDP2's own


@dataclass(frozen=True)
class _OnHost:
    """A tensor that FSDP2 does not see: it copies those of a forward pass to the GPU, and waits for it."""

    tensor: Tensor


def keep_on_host(value: Any, model: PreTrainedModel) -> Any:
    """An argument of `model`'s forward pass that reaches it on the CPU, sharded or not."""
    return _OnHost(value) if isinstance(value, Tensor) and isinstance(model, FSDPModule) else value


def _from_host(model: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return inputs, {name: value.tensor if isinstance(value, _OnHost) else value for name, value in named.items()}


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that transformers, too, keeps in one piece when it spreads a model over devices."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]
