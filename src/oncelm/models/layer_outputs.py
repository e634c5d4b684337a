"""What each layer of a model gives, for `output_hidden_states=True`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from oncelm.models.inputs import Inputs, spread


class LayerOutputs:
    """A context in which hooks record the input of the first layer and the output of each, the last one's behind the
    final norm, as transformers' own models return them.

    Args:
        stack: the layers in the order of computation, and the norm.
        inputs: of the forward pass; all its positions go through every layer.
    """

    def __init__(self, stack: Sequence[nn.Module], inputs: Inputs) -> None:
        self.first, self.modules, self.inputs = stack[0], [*stack[:-2], stack[-1]], inputs
        self._latest: list[torch.Tensor] = []
        self._windows: list[list[torch.Tensor]] = []

    def __enter__(self) -> LayerOutputs:
        def before(module: nn.Module, given: tuple[Any, ...]) -> None:
            self._latest.append(given[0])

        def after(module: nn.Module, given: tuple[Any, ...], output: torch.Tensor) -> None:
            self._latest.append(output)

        self._hooks = [self.first.register_forward_pre_hook(before)]
        self._hooks += [module.register_forward_hook(after) for module in self.modules]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def take(self, columns: slice) -> None:
        """The layers have run on these columns of the input."""
        real = None if self.inputs.real is None else self.inputs.real[:, columns]
        self._windows.append([spread(x, real) for x in self._latest])
        self._latest = []

    def found(self) -> tuple[torch.Tensor, ...]:
        """[B, T, d] of each, zeros at padding."""
        return tuple(torch.cat(parts, 1) if len(parts) > 1 else parts[0] for parts in zip(*self._windows, strict=True))
