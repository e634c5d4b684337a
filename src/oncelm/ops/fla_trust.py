"""Kernels of flash-linear-attention (package `fla`) are used where they agree with the PyTorch form, and nowhere else.

Whether they do depends on GPU, Triton and sizes: on Hopper with Triton 3.4 to 3.7.0, for instance, the gated backward
pass was wrong and now refuses (fla-org/flash-linear-attention, issue 640). So each combination is tried once, on
made-up inputs, before it computes anything that counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence

import torch

from oncelm.utils.errors import is_out_of_memory

Tensor = torch.Tensor
Results = tuple[Tensor, Tensor]  # output and final state

# Largest relative error of an output, a state or a gradient; their kernels' own rounding is a third of it
TOLERANCE = {torch.float32: 5e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}

_trusted: dict[Hashable, bool] = {}


def learns(*tensors: Tensor) -> bool:
    """Whether a backward pass may come for a function of these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def trusted(
    op: str,
    key: tuple[Hashable, ...],
    kernels: Callable[..., Results],
    exact: Callable[..., Results],
    inputs: Callable[[], Sequence[Tensor]],
    gradients: bool,
) -> bool:
    """Whether `kernels` give what `exact` gives of `inputs()`, with gradients if wanted. Tried once a key.

    Where they do not, or cannot run, one warning says why, and the caller computes without them.
    """
    key = (op, *key, gradients)
    if key not in _trusted:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # no room for a trial in a CUDA graph; the next call outside one makes it
        _trusted[key] = _try(op, kernels, exact, inputs(), gradients)
    return _trusted[key]


def _try(op: str, kernels: Callable, exact: Callable, inputs: Sequence[Tensor], gradients: bool) -> bool:
    dtype, device = inputs[0].dtype, inputs[0].device
    with torch.autocast(device.type, enabled=False):
        expected = _results(exact, inputs, gradients)
        try:
            found = _results(kernels, inputs, gradients)
            error = max(
                ((x.double() - y.double()).norm() / y.double().norm()).nan_to_num(torch.inf).item()
                for x, y in zip(found, expected, strict=True)
            )
            if error <= TOLERANCE[dtype]:
                return True
            reason = f"they differ from the definition by {error:.2g}"
        except Exception as failure:  # whatever a library, or the compiler of its kernels, may raise
            if is_out_of_memory(failure):
                raise
            reason = f"{type(failure).__name__}: {failure}".split("\n")[0]
    direction = "with gradients" if gradients else "without gradients"
    warnings.warn(
        f"{op} {direction} in {str(dtype).removeprefix('torch.')} runs in PyTorch: flash-linear-attention's kernels "
        f"are not used on this {device.type} device ({reason}).",
        stacklevel=4,
    )
    return False


def _results(function: Callable[..., Results], inputs: Sequence[Tensor], gradients: bool) -> list[Tensor]:
    """Output, final state, and with `gradients` those of all inputs, where the results' own are their sines."""
    if not gradients:
        return list(function(*inputs))
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    results = function(*leaves)
    return [*(x.detach() for x in results), *torch.autograd.grad(results, leaves, [x.detach().sin() for x in results])]
