"""Whether a module computes just what its class says, so that a kernel may read its weights instead of calling it.

Tools change what a module computes without touching its weights: adapters take its place, 4-bit layers too, hooks stand
before and behind it, offloading replaces the `forward` of the instance. Whoever reads a weight past its module asks
here first, and calls the module otherwise.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from oncelm.models.rms_norm import RMSNorm


def is_untouched(*modules: nn.Module) -> bool:
    """Whether calling these modules runs their class's `forward` and nothing else."""
    return not _has_any_global_hook() and not any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        for module in modules
    )


def is_plain_linear(*layers: nn.Module) -> bool:
    """Whether nothing but a product with the weight, row by row in memory, happens in these layers: no adapters, no
    hooks, no weights split over ranks or kept elsewhere."""
    return is_untouched(*layers) and all(
        type(layer) is nn.Linear
        and layer.bias is None
        and type(layer.weight) is nn.Parameter
        and layer.weight.is_contiguous()
        and not layer.weight.is_meta
        for layer in layers
    )


def is_plain_norm(*norms: nn.Module) -> bool:
    """Whether nothing but RMSNorm with the weight happens in these modules."""
    return is_untouched(*norms) and all(
        type(norm) is RMSNorm and type(norm.weight) is nn.Parameter and not norm.weight.is_meta for norm in norms
    )


class Wiring:
    """Which modules, hooks and weights a model has now: what a recorded CUDA graph was recorded of.

    Walking a model takes milliseconds, so the dictionaries in which modules, weights and hooks are registered are
    looked up once, and compared at each use: tens of microseconds.
    """

    def __init__(self, model: nn.Module, plain_types: tuple[type[nn.Module], ...]) -> None:
        inner = [module for module in model.modules() if module is not model]
        self._is_known = all(type(module) in plain_types for module in inner)
        self._children = [module._modules for module in model.modules()]
        self._parameters = [module._parameters for module in inner]
        self._hooks = [
            hooks
            for module in inner
            for hooks in (
                module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
            )
        ]  # fmt: skip
        self._attributes = [module.__dict__ for module in inner]
        self._recorded = self._now()

    @property
    def is_plain(self) -> bool:
        """Whether all modules are of the known kinds and run nothing but their own `forward`."""
        return (
            self._is_known
            and not any(self._hooks)
            and not any("forward" in attributes for attributes in self._attributes)
            and not _has_any_global_hook()
        )

    @property
    def is_unchanged(self) -> bool:
        """Whether modules and weights are the same objects at the same addresses as when this was made."""
        return self._now() == self._recorded

    def _now(self) -> tuple[list[int], list[int], list[int]]:
        children = [id(child) for registered in self._children for child in registered.values()]
        weights: list[torch.Tensor] = [
            weight for registered in self._parameters for weight in registered.values() if weight is not None
        ]
        return children, [id(weight) for weight in weights], [weight.data_ptr() for weight in weights]
