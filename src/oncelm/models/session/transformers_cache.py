"""A session of any other causal language model, through the cache that transformers makes for it."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from oncelm.models.session.base import READ_AT_ONCE, Session, pad


class TransformersSession(Session):
    """Any other causal language model of transformers, with the cache that it makes itself.

    Rows of different lengths are padded on the right, which a causal model never sees. They branch where the cache is
    nothing but keys and values of every token, and the model's masks and positions can be told of the padding between
    them.
    """

    def __init__(
        self, model: PreTrainedModel, rows: int = 1, room: int | None = None, chunk_size: int | None = None
    ) -> None:
        super().__init__(model, rows, room, chunk_size)
        parameters = inspect.signature(model.forward).parameters
        self._keeps_last, self._takes_positions = "logits_to_keep" in parameters, "position_ids" in parameters
        self._columns = 0  # of the cache
        self._real: torch.Tensor | None = None  # which of them are tokens, bool [N, columns]; None: all

    @cached_property
    def _one_token(self) -> Any:
        """The cache behind one token, which shows of what kind it is."""
        with torch.no_grad():
            output = self.model(torch.zeros(1, 1, dtype=torch.long, device=self.model.device), use_cache=True)
        return getattr(output, "past_key_values", None)

    @cached_property
    def branches(self) -> bool:  # type: ignore[override]
        # models that are not backend compatible make masks of their own: some count columns
        told = self._takes_positions and self.model.is_backend_compatible()
        return told and keeps_every_token(self._one_token)

    @property
    def longest(self) -> int | None:  # type: ignore[override]
        return None if self.branches else READ_AT_ONCE

    @property
    def num_tokens(self) -> int:
        return self._columns if self._real is None else int(self._real.sum(1).max())

    @torch.no_grad()
    def read(self, ids: torch.Tensor, progress: Callable[[int], object] | None = None) -> torch.Tensor:
        self._check_rows(ids)
        self._check_room(ids.shape[1])
        for chunk in ids.split(self.chunk_size or READ_AT_ONCE, dim=1):
            logits = self._forward(chunk, keep=1)[:, -1].clone()  # a view would keep all of a model's that leaves none
            if progress is not None:
                progress(self.num_tokens)
        return logits

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self._check_rows(tokens)
        self._check_room(1)
        return self._forward(tokens, keep=1)[:, -1]

    @torch.no_grad()
    def score(self, texts: Sequence[torch.Tensor], wanted: torch.Tensor | None = None) -> torch.Tensor:
        self._check_room(max(map(len, texts)))
        if len(texts) == 1 and wanted is None:
            return self._forward(texts[0][None])[0]
        if not self.branches:
            self._check_whole(texts)
        ids, real = pad(texts)
        kept = real.flatten().nonzero()[:, 0]
        with head_reads(self.model.get_output_embeddings(), kept if wanted is None else kept[wanted]):
            if self.branches:
                return self._forward(ids, real)
            return self.model(ids.to(self.model.device), use_cache=False).logits

    def select(self, rows: Sequence[int]) -> None:
        self._check_read()
        self.cache.reorder_cache(torch.tensor(rows))
        self._real = None if self._real is None else self._real[rows]
        self.rows = len(rows)

    def mark(self) -> Any:
        return self._columns, self._real, None if keeps_every_token(self.cache) else copy.deepcopy(self.cache)

    def rewind(self, mark: Any) -> None:
        columns, real, saved = mark
        if saved is not None or not columns:
            self.cache = copy.deepcopy(saved)
        elif self._columns < columns:
            raise ValueError(
                f"this mark is behind {columns} tokens a row, of which a return to an earlier one left {self._columns}."
            )
        elif self._columns > columns:
            self.cache.crop(columns - self._columns)
        self._columns, self._real = columns, real

    def free(self) -> None:
        super().free()
        self._columns, self._real = 0, None

    def bytes_of(self, tokens: int) -> int:
        return tokens * cache_bytes(self._one_token) if self.branches else 0

    def nbytes(self) -> int:
        return cache_bytes(self.cache)

    def _forward(self, ids: torch.Tensor, real: torch.Tensor | None = None, keep: int = 0) -> torch.Tensor:
        """Append ids [N, T], of which `real` [N, T] are tokens (None: all): logits [N, T, V], or of the last `keep`
        columns only where the model can leave the rest."""
        options: dict[str, Any] = {"logits_to_keep": keep} if self._keeps_last else {}
        if real is not None or self._real is not None:
            options |= self._padding(torch.ones(ids.shape, dtype=torch.bool) if real is None else real)
        ids = ids.to(self.model.device)
        output = self.model(ids, past_key_values=self.cache, use_cache=True, **options)
        self.cache = output.past_key_values
        self._columns += ids.shape[1]
        return output.logits

    def _padding(self, real: torch.Tensor) -> dict[str, torch.Tensor]:
        """The mask and positions of columns `real` [N, T] behind the earlier ones."""
        earlier = self._real
        if earlier is None:
            earlier = torch.ones(len(real), self._columns, dtype=torch.bool)
        self._real = torch.cat((earlier, real), 1)
        if not self._columns:  # at first, positions and the causal mask are right by themselves
            return {}
        # those of padding are clipped: there may be no more positions than the model was made for
        lengths, columns = real.sum(1, keepdim=True), torch.arange(real.shape[1])
        positions = earlier.sum(1, keepdim=True) + columns.minimum(lengths - 1)
        device = self.model.device
        return {"attention_mask": self._real.long().to(device), "position_ids": positions.to(device)}


def keeps_every_token(cache: Any) -> bool:
    """Whether a cache is nothing but keys and values of every token, so that its end can be cut off."""
    return type(cache) is DynamicCache and all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values in a cache of transformers."""
    held = (getattr(layer, name, None) for layer in getattr(cache, "layers", ()) for name in ("keys", "values"))
    return sum(tensor.nbytes for tensor in held if tensor is not None)


@contextlib.contextmanager
def head_reads(head: nn.Module, kept: torch.Tensor) -> Iterator[None]:
    """Within, a model's head is given the hidden states [B, T, d] at the places `kept` of B * T only, as [count, d].

    transformers' `logits_to_keep` takes the same columns of every row, and the model's own forward pass may do more
    with logits than its head does (scale them, cap them), so the choice is made between the two.
    """
    handle = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].flatten(0, 1)[kept.to(inputs[0].device)],))
    try:
        yield
    finally:
        handle.remove()
