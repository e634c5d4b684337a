"""What `oncelm bench ops` needs to know of an op to check and time it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from oncelm.models.work import Work

Tensor = torch.Tensor
Function = Callable[..., Tensor]  # of an op's inputs
Sizes = dict[str, int]


@dataclass(frozen=True)
class OpCase:
    """One op.

    Attributes:
        sizes: for "cpu" and "cuda", what is timed; for "gate", what is compared with the definition.
        inputs: tensors from sizes and a function normal(*shape); those that are floating learn.
        ours: the op.
        exact: its definition; the gate runs it in float64.
        plain: the same in plain PyTorch: the gate allows twice its error.
        peers: name -> a function that imports another implementation and returns it for these sizes; ImportError means
            that it is not here.
        work: from sizes and bytes a number, the forward pass; None stands for a pass that the op does not have.
        work_both: the same for forward and backward.
    """

    sizes: dict[str, tuple[Sizes, ...]]
    inputs: Callable[[Sizes, Callable[..., Tensor]], tuple[Tensor, ...]]
    ours: Callable[[Sizes], Function]
    exact: Callable[[Sizes], Function]
    plain: Callable[[Sizes], Function]
    work: Callable[[Sizes, int], Work]
    work_both: Callable[[Sizes, int], Work] | None = None
    peers: dict[str, Callable[[Sizes], Function]] = field(default_factory=dict)
