"""What a YOCO model asks of the past, and what a YocoCache asks of its layers.

A model does not know where keys, values and states are stored. Its caller passes a `Past`: a YocoCache (decoding), or
`Pasts` whose layers have no earlier tokens (training) or exchange them with other processes (context parallelism). Each
mixer chooses the methods that its layer's past must have; the protocols here are those of OnceLM's own mixers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from oncelm.cache.batch import Batch
from oncelm.cache.yoco.places import Places

Tensors = tuple[torch.Tensor, ...]


class RecurrentPast(Protocol):
    """The past of a layer whose states are of fixed size, as of gated retention."""

    def scan(
        self,
        name: str,
        op: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
        inputs: Tensors,
        batch: Batch,
        step: Callable[..., torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """What `op` makes of the inputs [B, T, ...] of the batch's tokens: [B, T, ...].

        Args:
            name: of the state, each once a forward pass.
            op: called as `op(*inputs, initial_state=, output_final_state=, cu_seqlens=)`, the usual form of linear
                attention: what comes out, and the state [N, ...] behind the last token of each sequence.
            step: called as `step(*inputs, state)` where each sequence has one token: what comes out; the state has
                been changed in place. One with an argument `slots` is called as `step(*inputs, states, slots=)` where
                sequence n's state is number slots[n] of more; one with `kept` too, where each has a few tokens of which
                just the first kept[n] may change it. None: `op` does that too.
        """
        ...


class WindowPast(Protocol):
    """The past of a sliding-window layer."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> torch.Tensor:
        """q [B, T, H, D], k, v [B, T, H_kv, D] -> [B, T, H, D]."""
        ...


class SharedPast(Protocol):
    """Keys and values of all tokens: the global ones, which all layers of the cross-decoder read."""

    def append(self, k: torch.Tensor, v: torch.Tensor, batch: Batch) -> None:
        """Take in k, v [B, T, H_kv, D] of the batch's tokens."""
        ...

    def attend(self, q: torch.Tensor, batch: Batch) -> torch.Tensor:
        """q [B, P, H, D] at the batch's positions (any that were appended) -> [B, P, H, D]."""
        ...


class Past(Protocol):
    """The past of a whole model: one object a self-decoder layer, and the shared one."""

    @property
    def layers(self) -> Sequence[Any]: ...

    @property
    def shared(self) -> Any: ...

    def check_room(self, new_tokens: Sequence[int]) -> None:
        """ValueError unless each sequence can take its number of `new_tokens` more."""
        ...

    def begin(self) -> None:
        """A forward pass begins: until `commit`, layers are changed one by one."""
        ...

    def commit(self, batch: Batch, columns: int) -> None:
        """All layers have taken in `batch`, which stood in `columns` columns of input."""
        ...


class HeldPast(Past, Protocol):
    """The past of sequences of which something came before."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that came before, of each sequence."""
        ...


@dataclass
class Pasts:
    """A Past, put together for one forward pass."""

    layers: Sequence[Any]
    shared: Any
    lengths: tuple[int, ...] = ()

    def check_room(self, new_tokens: Sequence[int]) -> None:
        """There is room: nothing outlives the pass."""

    def begin(self) -> None:
        """Nothing to mark."""

    def commit(self, batch: Batch, columns: int) -> None:
        """Nothing moves on."""


class LayerCache(Protocol):
    """The past of one layer in decoding, as the YocoCache around it handles it: of N sequences.

    Attributes:
        tensor_names: attributes that hold its tensors, [N, ...], or [N, S, ...] with a row a token if it `grows`.
        grows: rows of tokens are added and never changed, so that undoing leaves them where they are.
    """

    tensor_names: tuple[str, ...]
    grows: bool

    def record(self, on: bool) -> None:
        """Remember forward passes from now on, or no longer, so that `rewind` can undo them; forget earlier ones."""
        ...

    def rewind(self, kept: Batch) -> None:
        """Forget the last recorded forward pass but the first `kept.lengths` tokens of each sequence."""
        ...

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` a sequence."""
        ...

    def select(self, index: torch.Tensor, num_tokens: int) -> None:
        """Keep sequences `index` [M], of which `num_tokens` tokens are held."""
        ...

    def step_form(self) -> Any:
        """A past on the same tensors for one new token a sequence at positions that only the device knows."""
        ...

    def pool_form(self, places: Places) -> Any:
        """A past on the same tensors for one pass of an engine, in which they are a pool: each of the N is a slot or,
        if it `grows`, a page, and `places` says which ones the sequences of the pass have."""
        ...
