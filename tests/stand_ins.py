"""A device whose values nobody can wait for: torch's meta device, with something in the place of the kernels.

A tensor there has no values, so a pass that reads one, as one that waits for a GPU does, fails.
"""

from __future__ import annotations

import contextlib

import pytest
import torch

from oncelm.ops.dispatch import TABLE, Implementation


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ops run on the meta device, which knows no autocast either."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: False)
    monkeypatch.setattr(torch, "autocast", lambda *device, **options: contextlib.nullcontext())
    for op, name in (
        ("gated_retention", "retention"),
        ("window_attention", "attention"),
        ("global_attention", "attention"),
    ):
        row = Implementation("stand-in", f"{__name__}:{name}", ("meta",), "", packed=True)
        monkeypatch.setitem(TABLE, op, (row, *TABLE[op]))


def retention(q, k, v, g, scale, initial_state, cu_seqlens=None):
    return v * (q * k).sum(-1, keepdim=True) * g[..., None], v.new_empty(0)


def attention(q, k, v, *rest):
    return q + (k.sum() + v.sum())
