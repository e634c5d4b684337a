"""Which implementation of an op serves which device: one table, printed by `oncelm info`.

An op's public function calls `implementation(op, backend, device)`; `backend="auto"` takes the first row that
supports the device. A faster implementation is added as a row above the portable one, and nothing else changes.
"""

from __future__ import annotations

import importlib
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


ANY = ("cpu", "cuda", "mps")

TABLE: dict[str, tuple[Implementation, ...]] = {
    "gated_retention": (
        Implementation("chunk", "oncelm.ops.gated_retention.chunk:chunk", ANY, "PyTorch, linear in T"),
        Implementation("recurrent", "oncelm.ops.gated_retention.recurrent:recurrent", ANY, "one step a token"),
        Implementation("naive", "oncelm.ops.gated_retention.naive:parallel", ANY, "reference, quadratic in T"),
    ),
    "window_attention": (
        Implementation("sdpa", "oncelm.ops.attention.sdpa:window", ANY, "blocks of queries through SDPA"),
        Implementation("naive", "oncelm.ops.attention.naive:window", ANY, "reference, full score matrix"),
    ),
    "global_attention": (
        Implementation("sdpa", "oncelm.ops.attention.sdpa:causal", ANY, "SDPA; blocks of queries where masked"),
        Implementation("naive", "oncelm.ops.attention.naive:causal", ANY, "reference, full score matrix"),
    ),
}


@cache
def _load(location: str) -> Callable:
    module, _, function = location.partition(":")
    return getattr(importlib.import_module(module), function)


def implementation(op: str, backend: str, device: torch.device) -> Callable:
    """The function that computes `op` on `device`; ValueError for an unknown or unsuited backend."""
    rows = TABLE[op]
    if backend == "auto":
        return _load(next(row for row in rows if device.type in row.devices).location)
    for row in rows:
        if row.backend == backend:
            if device.type not in row.devices:
                raise ValueError(f"backend {backend!r} of {op} runs on {', '.join(row.devices)}, not on {device.type}.")
            return _load(row.location)
    raise unknown(f"backend of {op}", backend, ["auto", *(row.backend for row in rows)])
