"""Where a NaN or Inf came from: the step computed once more, with every module's output looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from oncelm.train.parallel.mesh import Mesh

WEIGHTS, FORWARD, BACKWARD = range(3)


@dataclass(frozen=True, order=True)
class NotFinite:
    """A place that is not finite. Of all ranks, the lowest stage is the cause: gradients pass it on to others."""

    stage: int
    place: str


def find_not_finite(model: nn.Module, compute: Callable[[], Tensor]) -> NotFinite | None:
    """The first place, in the order of computation, that is not finite; None if all of it is.

    Weights are looked at first, then the outputs of modules in the forward pass, then their gradients in the backward
    pass. Gradients of the model are gone afterwards.

    Args:
        compute: a forward pass of `model` that returns the loss.
    """
    # What is found first stays; all of it is computed in any case, because other ranks may have to wait for this one.
    bad = next((name for name, parameter in model.named_parameters() if not _is_finite(parameter)), None)
    found = [NotFinite(WEIGHTS, f"the weight {bad}")] if bad else []

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not found and not _is_finite(tensor):
                    found.append(NotFinite(FORWARD, f"the output of {name or 'the model'}"))
                if tensor.requires_grad:
                    tensor.register_hook(lambda gradient: backward(gradient))

        def backward(gradient: Tensor) -> None:
            if not found and not _is_finite(gradient):
                found.append(NotFinite(BACKWARD, f"the gradient of the output of {name or 'the model'}"))

        return hook

    # but containers right below the model: they give what their last module gives, and some are not called as a whole
    hooked = [
        (name, module)
        for name, module in model.named_modules()
        if not name or "." in name or next(module.children(), None) is None
    ]
    handles = [module.register_forward_hook(after(name)) for name, module in hooked]
    try:
        loss = compute()
        if not found and not _is_finite(loss):
            found.append(NotFinite(FORWARD, "the loss"))
        loss.backward()
        if not found:
            weights = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
            bad = next((name for name, gradient in weights if not _is_finite(gradient)), None)
            found += [NotFinite(BACKWARD, f"the gradient of {bad}")] if bad else []
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return found[0] if found else None


def _is_finite(tensor: Tensor) -> bool:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return not local.is_floating_point() or bool(torch.isfinite(local.detach()).all())


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def first_not_finite(model: nn.Module, passes: Sequence[tuple[Callable[[], Tensor], str]], mesh: Mesh) -> str:
    """The first place of a step that is not finite, of all ranks, as a sentence. All ranks call it.

    Args:
        passes: this rank's forward passes, each with what it computes on, in words.
    """
    found = []
    for compute, sequences in passes:
        # every rank goes through all of its passes: sharded layers need all ranks
        where = find_not_finite(model, compute)
        if where is not None:
            found.append((where, sequences))
    every = [one for of_rank in mesh.gather(found) for one in of_rank]
    if not every:
        return "computed once more, the step is finite"
    where, sequences = min(every, key=lambda one: one[0].stage)
    return f"the first place is {where.place}, in {sequences}"
