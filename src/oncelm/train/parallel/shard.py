"""Weights, gradients and optimizer state split over ranks: FSDP2, and tensor parallelism inside each shard.

    rank 0: the model, on the CPU  ──▶  all ranks: the model without values (meta)  ──▶  split  ──▶  values from rank 0

Values reach the others one tensor at a time, so only rank 0 ever has a full copy, in its host's memory; a rank may
hand in a model on the meta device.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from oncelm.train.parallel.ranks import Ranks
from oncelm.train.parallel.tensor import split_layers


def shard_model(model: PreTrainedModel, ranks: Ranks, dtype: torch.dtype) -> None:
    """Split `model` over the ranks, in place, with the first rank's values.

    Layers are gathered in `dtype` when they are computed, and their gradients summed in float32. What is outside of
    them (embeddings, output projection, shared K/V projections) stays float32: autocast casts it where it is used, as
    on one GPU, and the residual stream starts in float32.
    """
    assert ranks.mesh is not None
    values = model.state_dict() if ranks.is_main else {}
    buffers = dict(model.named_buffers())  # those too that no state dict has
    model.to("meta")
    model.tie_weights()
    if ranks.tensor.size > 1:
        split_layers(model, ranks.mesh["tensor"])
    shard = ranks.mesh["shard"]
    narrow = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=shard, mp_policy=narrow)
    embeddings, output = model.get_input_embeddings(), model.get_output_embeddings()
    if embeddings.weight is not output.weight:
        fully_shard(embeddings, mesh=shard)
    fully_shard(model, mesh=shard)

    model.to_empty(device=ranks.device)
    model.tie_weights()
    set_model_state_dict(
        model, values, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=ranks.is_main)
    )
    for name, buffer in model.named_buffers():
        if ranks.is_main:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, src=0)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that transformers, too, keeps in one piece when it spreads a model over devices."""
    names = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in names]
