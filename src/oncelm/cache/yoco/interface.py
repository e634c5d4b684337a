"""What a YOCO model asks of the past: the four calls in which tokens meet each other.

A model never knows where keys, values and states live. Whoever runs it passes an object with these methods: YocoCache
(contiguous, decoding), FreshPast (nothing remembered, training), ChunkPast (of `oncelm.train.parallel`: chunks of
sequences that other processes hold), and later paged slots in an engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from oncelm.cache.batch import Batch


class RetentionPast(Protocol):
    """The past of one gated-retention layer."""

    def retain(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, batch: Batch) -> torch.Tensor:
        """q, k [B, T, H, K], v [B, T, H, V], log decay g [B, T, H] -> o [B, T, H, V]."""
        ...


class WindowPast(Protocol):
    """The past of one sliding-window layer."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """q [B, T, H, D], k, v [B, T, H_kv, D] -> [B, T, H, D]."""
        ...


class SharedPast(Protocol):
    """The global keys and values that all layers of the cross-decoder read."""

    def append(self, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> None:
        """Take in k, v [B, T, H_kv, D] of the batch's tokens."""
        ...

    def attend(self, q: torch.Tensor, batch: Batch) -> torch.Tensor:
        """q [B, P, H, D] at the batch's positions (any that were appended) -> [B, P, H, D]."""
        ...


class Past(Protocol):
    """The past of a whole model: one RetentionPast or WindowPast a self-decoder layer, and the shared one."""

    @property
    def layers(self) -> Sequence[Any]: ...

    @property
    def shared(self) -> Any: ...


class HeldPast(Past, Protocol):
    """The past of sequences of which something came before."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that came before, of each sequence."""
        ...
