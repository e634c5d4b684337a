"""Tensor parallelism: every rank computes some heads and some hidden units of each layer.

    split by output rows      q, k, v, g, gt, fc1, gate: a rank's heads or units     no exchange
    split by input columns    out_proj, fc2: sums over all heads or units            an all-reduce each
    split by vocabulary       embeddings and output projection                       the loss needs no logits of others

Norms are computed on all ranks alike. Their outputs are DTensors, so that the gradients of all projections of one norm
are summed by one all-reduce. Where there are fewer key/value heads than ranks, their projections are kept whole, and a
rank takes the one head that its query heads read. Each family defines how its modules are split (`models/split.py`).
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

from oncelm.models import split
from oncelm.models.registry import family
from oncelm.models.split import Heads, Split


def split_layers(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Turn the parameters of a model into DTensors over a one-dimensional mesh, and its modules to match.

    Raises:
        ValueError: it cannot be split so, as its family says (`tensor_plan`).
    """
    plan = family(model.config).tensor_plan(model.config, mesh.size())
    names = [name for name, _ in model.named_modules()]
    present = {
        place: _style(how, mesh.size())
        for place, how in plan.items()
        if any(fnmatchcase(name, place) for name in names)
    }
    parallelize_module(model, mesh, present)
    model.tie_weights()


def _style(how: Split, ranks: int) -> ParallelStyle:
    """torch's form of a way to split a module; its names go by the transposed weight."""
    if isinstance(how, Heads):
        return ColwiseParallel() if how.num % ranks == 0 else _OneHead(how.num, how.dim)
    return {
        split.ROWS: ColwiseParallel(),
        split.COLUMNS: RowwiseParallel(),
        split.EMBEDDING: RowwiseParallel(input_layouts=Replicate()),
        split.LOGITS: ColwiseParallel(output_layouts=Replicate()),
        split.WHOLE: _Whole(),
        split.WHOLE_AT_THE_END: _Whole(use_local_output=True),
    }[how]


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
