"""Whether a module computes only what its class computes, so that a kernel may read its weights instead of calling it.

Tools change what a module computes without touching its weights: adapters take its place, 4-bit layers too, hooks stand
before and behind it, offloading replaces the `forward` of the instance. Whoever reads a weight past its module asks
here first, and calls the module otherwise.
"""

from __future__ import annotations

from itertools import chain
from operator import getitem
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
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


def takes_parts(layer: nn.Module) -> bool:
    """Whether compiled or fused parts may pass a layer's modules over: no hooks stand at them, for which torch.compile
    would not look, but those that split them over ranks, which were there before anything was compiled."""
    inner = list(layer.modules())[1:]
    return is_untouched(*inner) or any(isinstance(weight, DTensor) for weight in layer.parameters())


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

    Walking a model takes milliseconds. So the dictionaries in which modules, weights, hooks and attributes are
    registered are looked up once, and compared at each use without a loop in Python: some 50 microseconds for 26
    layers.
    """

    def __init__(self, model: nn.Module, plain_types: tuple[type[nn.Module], ...]) -> None:
        inner = [module for module in model.modules() if module is not model]
        self._children = [module._modules for module in model.modules() if module._modules]
        found = [(held, name) for held in (m._parameters for m in inner) for name in held if held[name] is not None]
        self._registered: list[dict[str, Any]] = [held for held, _ in found]
        self._names = [name for _, name in found]
        self._hooks = [hooks for module in inner for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self._attributes = [module.__dict__ for module in inner]
        self._recorded = self._modules_now(), self._addresses_now(), self._attributes_now()
        self._is_plain = all(type(module) in plain_types and "forward" not in module.__dict__ for module in inner)

    @property
    def is_plain(self) -> bool:
        """Whether all modules are of the known kinds and run nothing but their own `forward`."""
        return self._is_plain and not any(self._hooks) and not _has_any_global_hook()

    @property
    def is_unchanged(self) -> bool:
        """Whether modules are the same objects as when this was made, with weights at the same addresses."""
        modules, addresses, attributes = self._recorded
        return (
            self._attributes_now() == attributes
            and self._addresses_now() == addresses
            and self._modules_now() == modules
        )

    def _modules_now(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(dict.values, self._children)))

    def _addresses_now(self) -> list[int]:
        """Of each weight; none where one is gone, as a parametrised one is, to a module of its own."""
        try:
            return list(map(torch.Tensor.data_ptr, map(getitem, self._registered, self._names)))
        except KeyError:
            return []

    def _attributes_now(self) -> int:
        """How many attributes the modules have of their own: another `forward` is one more."""
        return sum(map(len, self._attributes))
