"""Token-wise parts of layers through torch.compile: once for all layers of a kind, not once a layer.

Compiling fuses norms, rotations, gates and residual sums into few kernels. Dynamo takes a layer's weights as inputs, so
that layers of a kind share a graph. The calls in which tokens meet are not compiled, so any past works, and a chunk's
position in the text causes no recompilation. Without gradients there is one graph for any T, with gradients one for the
first shape and one for all others; B = 1 and B > 1 are two graphs, and so are two dtypes.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

MIN_TOKENS = 64  # in all rows; for fewer, as in decoding, checking a compiled part's conditions costs what it saves
MAX_GRAPHS = 64  # of one part, over all models of a process
# of inductor, without gradients: ten seconds more of compiling, a fifth less in its kernels (with them: over a minute)
OPTIONS: dict[str, Any] = {"coordinate_descent_tuning": True}


@functools.cache
def compiled(part: Callable, kind: str, gradients: bool) -> Callable:
    """`part(owner, *tensors)`, compiled for one kind of owners, for all models; compiling waits for the first call.

    Prompts come in any length: without gradients, graphs take any T from the start. A training batch is of one shape,
    and fixed shapes make better backward kernels; a second shape makes a graph for any.
    """
    # dynamo keeps graphs, and what it knows of shapes, by code object: with one of its own, no kind disturbs another
    code = part.__code__.replace(co_name=f"{part.__name__}_{kind}")
    own = types.FunctionType(code, part.__globals__)
    if gradients:
        return torch.compile(own, fullgraph=True, **_limit())
    run = torch.compile(own, fullgraph=True, options=OPTIONS, **_limit())

    def run_any_length(owner: nn.Module, *tensors: torch.Tensor | None) -> Any:
        for tensor in tensors:
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return run(owner, *tensors)

    return run_any_length


def _limit() -> dict[str, Any]:
    """Of graphs, as an argument of torch.compile: other compiled functions of the process keep theirs."""
    limit = max(MAX_GRAPHS, torch._dynamo.config.recompile_limit)
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        return {"recompile_limit": limit}
    torch._dynamo.config.recompile_limit = limit  # torch 2.11 knows no other
    return {}


class CompilesLayers:
    """The part of a model that decides whether its layers are compiled."""

    can_compile = True
    compiles_layers = False

    def compile_layers(self, enabled: bool = True) -> Self:
        """Compute the token-wise parts of the layers with torch.compile, wherever at least MIN_TOKENS tokens are read:
        in prefill, scoring and training.

        The first pass of each kind compiles, which takes half a minute on a GPU. Results agree to rounding. Needs a
        C++ compiler (CPU) or Triton (GPU).

        Args:
            enabled: False goes back to plain PyTorch.

        Returns:
            The model itself.
        """
        self.compiles_layers = enabled
        return self

    def compiles(self, x: torch.Tensor) -> bool:
        """Whether layers compute x [B, T, d] in their compiled form."""
        return self.compiles_layers and x.shape[0] * x.shape[1] >= MIN_TOKENS
