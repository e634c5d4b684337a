"""Tensor parallelism of YOCO: every rank computes some heads and some hidden units of each layer.

    split by output rows      q, k, v, g, gt, fc1, gate: a rank's heads or units     no exchange
    split by input columns    out_proj, fc2: sums over all heads or units            an all-reduce each
    split by vocabulary       embeddings and output projection                       the loss needs no logits of others

Norms are computed on all ranks alike. Their outputs are DTensors, so that the gradients of all projections of one norm
are summed by one all-reduce. Where there are fewer key/value heads than ranks, their projections are kept whole, and a
rank takes the one head that its query heads read.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)
from transformers import PreTrainedModel

from oncelm.models.yoco import YocoForCausalLM
from oncelm.models.yoco.mixers.base import COLUMNS, ROWS, Heads, Split
from oncelm.models.yoco.mixers.registry import kinds_of, mixers_of


def check_split(model: PreTrainedModel, ranks: int) -> None:
    """ValueError for a model of another kind than YOCO, or whose heads, units or vocabulary do not divide."""
    if not isinstance(model, YocoForCausalLM):
        raise ValueError(f"tensor_parallel is for YOCO models; this is a {type(model).__name__}: leave it at 1.")
    config = model.config
    for mixer in kinds_of(config):
        mixer.tensor_plan(config, ranks)
    for name in ("num_self_heads", "num_attention_heads", "intermediate_size", "vocab_size"):
        if getattr(config, name) % ranks:
            raise ValueError(f"{name} {getattr(config, name)} does not divide among tensor_parallel {ranks} ranks.")
    for name, heads in (
        ("num_self_key_value_heads", config.self_kv_heads),
        ("num_key_value_heads", config.shared_kv_heads),
    ):
        if heads % ranks and ranks % heads:
            raise ValueError(
                f"{name} {heads} neither divides among tensor_parallel {ranks} ranks nor divides their number."
            )


def split_layers(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Turn the parameters of a YOCO model into DTensors over a one-dimensional mesh, and its modules to match.

    Raises:
        ValueError: it cannot be split so (`check_split`).
    """
    config, ranks = model.config, mesh.size()
    check_split(model, ranks)
    shared_kv = _style(Heads(config.shared_kv_heads, config.head_dim), ranks)
    by_rows, by_columns = _style(ROWS, ranks), _style(COLUMNS, ranks)
    plan: dict[str, ParallelStyle] = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "layer_norm": _Whole(use_local_output=True),
        "output_projection": ColwiseParallel(output_layouts=Replicate()),
    }
    for number, mixer in enumerate(mixers_of(config)):
        place = f"self_decoder.layers.{number}.mixer"
        plan |= {f"{place}.{name}": _style(split, ranks) for name, split in mixer.tensor_plan(config, ranks).items()}
    plan |= {"cross_decoder.layers.*.mixer.q_proj": by_rows, "cross_decoder.layers.*.mixer.out_proj": by_columns}
    for decoder in ("self_decoder", "cross_decoder"):
        layer = f"{decoder}.layers.*"
        plan |= {f"{layer}.ffn.fc1": by_rows, f"{layer}.ffn.gate": by_rows, f"{layer}.ffn.fc2": by_columns}
        plan |= {f"{layer}.mixer_layer_norm": _Whole(), f"{layer}.final_layer_norm": _Whole()}
    plan |= {"cross_decoder.k_proj": shared_kv, "cross_decoder.v_proj": shared_kv}
    plan |= {"cross_decoder.kv_layer_norm": _Whole()}
    names = [name for name, _ in model.named_modules()]
    present = {place: style for place, style in plan.items() if any(fnmatchcase(name, place) for name in names)}
    parallelize_module(model, mesh, present)
    model.tie_weights()


def _style(split: Split, ranks: int) -> ParallelStyle:
    """torch's word for a way to split a layer; its names go by the transposed weight."""
    if isinstance(split, Heads):
        return ColwiseParallel() if split.num % ranks == 0 else _OneHead(split.num, split.dim)
    return ColwiseParallel() if split == ROWS else RowwiseParallel()


class _Whole(ParallelStyle):
    """All ranks compute the module alike, as DTensors whose gradients are summed over the ranks where they differ.

    Args:
        use_local_output: return a plain tensor.
    """

    def __init__(self, use_local_output: bool = False) -> None:
        super().__init__()
        self.use_local_output = use_local_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        input_fn: Any = self._distribute_input  # its result counts, whatever torch's annotation says
        return distribute_module(module, device_mesh, None, input_fn, self._output)

    @staticmethod
    def _distribute_input(module: nn.Module, inputs: tuple, mesh: DeviceMesh) -> tuple:
        (x,) = inputs
        return (x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Replicate()], run_check=False),)

    def _output(self, module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        return output.to_local() if self.use_local_output else output


class _OneHead(_Whole):
    """A whole projection to key or value heads, of whose outputs a rank keeps the one head that its queries read."""

    def __init__(self, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim

    def _output(self, module: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
        first = mesh.get_local_rank() * self.num_heads // mesh.size() * self.head_dim
        # what the ranks send back are gradients of different heads: parts of a sum
        return output.to_local(grad_placements=[Partial()])[..., first : first + self.head_dim]
