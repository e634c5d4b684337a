"""Which implementation of an op serves which device: one table, printed by `oncelm info`.

An op's public function calls `implementation(op, backend, device)`; `backend="auto"` takes the first row that
supports the device and has what it needs. A faster implementation is added as a row above the portable one, and nothing
else changes.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from oncelm.utils.errors import unknown


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op: where the function lives, the devices it runs on, and what it is good for."""

    backend: str
    location: str  # "module:function"
    devices: tuple[str, ...]
    note: str
    needs: str | None = None  # a module that must be there
    package: str | None = None  # what to install for it, if its name is another
    packed: bool = False  # takes packed sequences itself

    @property
    def available(self) -> bool:
        return self.needs is None or _installed(self.needs)

    def load(self) -> Callable:
        return _load(self.location)


ANY = ("cpu", "cuda", "mps")

TABLE: dict[str, tuple[Implementation, ...]] = {
    "gated_retention": (
        Implementation(
            "triton",
            "oncelm.ops.gated_retention.triton:chunk",
            ("cuda",),
            "kernels, linear in T",
            "triton",
            packed=True,
        ),
        Implementation("chunk", "oncelm.ops.gated_retention.chunk:chunk", ANY, "PyTorch, linear in T"),
        Implementation("recurrent", "oncelm.ops.gated_retention.recurrent:recurrent", ANY, "one step a token"),
        Implementation("naive", "oncelm.ops.gated_retention.naive:parallel", ANY, "reference, quadratic in T"),
    ),
    "gated_retention_step": (
        Implementation(
            "triton", "oncelm.ops.gated_retention.step_triton:step", ("cuda",), "one kernel, in place", "triton"
        ),
        Implementation("naive", "oncelm.ops.gated_retention.recurrent:step", ANY, "PyTorch, in place"),
    ),
    "gated_delta": (
        Implementation(
            "fla",
            "oncelm.ops.gated_delta.fla:chunk",
            ("cuda",),
            "flash-linear-attention's kernels for 16-bit inputs",
            "fla",
            package="oncelm[fla]",
            packed=True,
        ),
        Implementation("chunk", "oncelm.ops.gated_delta.chunk:chunk", ANY, "PyTorch, linear in T"),
        Implementation("recurrent", "oncelm.ops.gated_delta.recurrent:recurrent", ANY, "one step a token"),
        Implementation("naive", "oncelm.ops.gated_delta.naive:by_token", ANY, "reference, a K x K matrix a token"),
    ),
    "gated_delta_step": (
        Implementation(
            "triton", "oncelm.ops.gated_delta.step_triton:step", ("cuda",), "one kernel, in place", "triton"
        ),
        Implementation("naive", "oncelm.ops.gated_delta.recurrent:step", ANY, "PyTorch, in place"),
    ),
    "short_convolution": (
        Implementation(
            "fla",
            "oncelm.ops.short_convolution.fla:convolve",
            ("cuda",),
            "flash-linear-attention's kernels",
            "fla",
            package="oncelm[fla]",
            packed=True,
        ),
        Implementation(
            "shifts", "oncelm.ops.short_convolution.shifts:shifts", ANY, "PyTorch, all tokens at once", packed=True
        ),
        Implementation("naive", "oncelm.ops.short_convolution.naive:by_token", ANY, "reference, one token at a time"),
    ),
    "window_attention": (
        Implementation(
            "cudnn",
            "oncelm.ops.attention.cudnn:window",
            ("cuda",),
            "cuDNN's forward, FlashAttention's backward",
            "cudnn",
            package="oncelm[cudnn]",
            packed=True,
        ),
        Implementation(
            "varlen",
            "oncelm.ops.attention.varlen:window",
            ("cuda",),
            "torch's FlashAttention, packed sequences too",
            packed=True,
        ),
        Implementation("sdpa", "oncelm.ops.attention.sdpa:window", ANY, "blocks of queries through SDPA"),
        Implementation("naive", "oncelm.ops.attention.naive:window", ANY, "reference, full score matrix"),
    ),
    "global_attention": (
        Implementation(
            "varlen",
            "oncelm.ops.attention.varlen:causal",
            ("cuda",),
            "torch's FlashAttention, packed sequences too",
            packed=True,
        ),
        Implementation("sdpa", "oncelm.ops.attention.sdpa:causal", ANY, "SDPA; blocks of queries where masked"),
        Implementation("naive", "oncelm.ops.attention.naive:causal", ANY, "reference, full score matrix"),
    ),
    "decode_attention": (
        Implementation(
            "triton",
            "oncelm.ops.attention.decode_triton:attend",
            ("cuda",),
            "kernels, each key and value read once",
            "triton",
        ),
        Implementation("sdpa", "oncelm.ops.attention.decode:sdpa", ANY, "SDPA, a key/value head at a time"),
        Implementation("naive", "oncelm.ops.attention.decode:naive", ANY, "reference, full score matrix"),
    ),
    "linear_cross_entropy": (
        Implementation(
            "triton",
            "oncelm.ops.linear_cross_entropy.triton:to_gradient",
            ("cuda",),
            "softmax and gradient in one kernel",
            "triton",
        ),
        Implementation("naive", "oncelm.ops.linear_cross_entropy.naive:to_gradient", ANY, "reference, PyTorch"),
    ),
    "crossbatch_attention": (
        Implementation("flex", "oncelm.ops.crossbatch.flex:packed", ("cuda",), "all rows in one FlexAttention call"),
        Implementation(
            "flash", "oncelm.ops.crossbatch.flash:running", ("cuda",), "one context at a time, torch's FlashAttention"
        ),
        Implementation("blocks", "oncelm.ops.crossbatch.blocks:running", ANY, "one context at a time, running softmax"),
        Implementation("naive", "oncelm.ops.crossbatch.naive:gathered", ANY, "reference, gathers all contexts"),
    ),
}


_find_spec = cache(importlib.util.find_spec)


# torch.compile can trace neither imports nor caches: the next two it runs, and takes what they return as constants
@torch.compiler.assume_constant_result
def _installed(package: str) -> bool:
    return _find_spec(package) is not None


@torch.compiler.assume_constant_result
def _import(module: str) -> None:
    importlib.import_module(module)


def _load(location: str) -> Callable:
    module, _, function = location.partition(":")
    _import(module)
    return getattr(sys.modules[module], function)


def choose(op: str, backend: str, device: torch.device) -> Implementation:
    """The row that computes `op` on `device`; ValueError for an unknown, unsuited or missing backend."""
    rows = TABLE[op]
    if backend == "auto":
        for row in rows:
            if device.type in row.devices and row.available:
                return row
        raise ValueError(f"no implementation of {op} runs on {device.type}.")
    for row in rows:
        if row.backend == backend:
            if device.type not in row.devices:
                raise ValueError(f"backend {backend!r} of {op} runs on {', '.join(row.devices)}, not on {device.type}.")
            if not row.available:
                install = row.package or row.needs
                raise ValueError(f"backend {backend!r} of {op} needs {row.needs}: `pip install {install}`.")
            return row
    raise unknown(f"backend of {op}", backend, ["auto", *(row.backend for row in rows)])


def implementation(op: str, backend: str, device: torch.device) -> Callable:
    """The function of that row."""
    return choose(op, backend, device).load()
