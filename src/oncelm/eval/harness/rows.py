"""Rows of text in one forward pass: read, then repeated and read on, with logits of the wanted tokens alone.

Two layouts: YOCO packs its rows, other models pad them on the right, which a causal model never sees.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import nn

from oncelm.eval.model import READ_AT_ONCE, LanguageModel, keeps_every_token
from oncelm.models.yoco.modeling import YocoForCausalLM


class PackedRows:
    """Rows of a YOCO, one behind the other; the cross-decoder runs on the wanted tokens only.

    Attributes:
        branches: whether rows can be repeated and read on.
        longest: tokens of the longest row that can be read at once; None where rows are read in parts.
    """

    branches = True
    longest: int | None = None

    def __init__(self, model: LanguageModel) -> None:
        self.language_model, self.model = model, model.model
        self.cache: Any = None

    def bytes_of(self, tokens: int) -> int:
        """Bytes of the cache of a row of so many tokens."""
        return self.model.new_cache(1, max_tokens=tokens).nbytes()

    def start(self, count: int, room: int) -> None:
        """Begin `count` rows of up to `room` tokens."""
        self.cache = self.model.new_cache(count, max_tokens=room)

    def clear(self) -> None:
        """Free what the rows hold."""
        self.cache = None

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows, in this order, with repeats."""
        self.cache.select(rows)

    def read(self, texts: Sequence[np.ndarray], wanted: np.ndarray) -> torch.Tensor:
        """Append to each row its text: logits [count, V] of the tokens `wanted`, a mask of all the texts' tokens."""
        borders = [0, *accumulate(len(text) for text in texts)]
        return self.model(
            torch.from_numpy(np.concatenate(texts)).to(self.model.device, torch.long)[None],
            past_key_values=self.cache,
            cu_seqlens=torch.tensor(borders, dtype=torch.int32),
            logits_to_keep=torch.from_numpy(wanted)[None],
        ).logits


class PaddedRows:
    """The same for any causal LM of transformers, and for LongLLaMA.

    Rows branch where the cache is nothing but keys and values of every token, and the model's masks and positions can
    be told of the padding between them. Other models read whole texts, without a cache.
    """

    @torch.no_grad()
    def __init__(self, model: LanguageModel) -> None:
        self.language_model, self.model = model, model.model
        output = self.model(torch.zeros(1, 1, dtype=torch.long, device=self.model.device), use_cache=True)
        cache: Any = getattr(output, "past_key_values", None)
        self.branches = (
            model.shares
            and keeps_every_token(cache)
            and self.model.is_backend_compatible()  # other models make masks of their own: some count columns
            and "position_ids" in inspect.signature(self.model.forward).parameters
        )
        layers = cache.layers if self.branches else ()
        self._token_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        self.longest: int | None = None
        if not self.branches:  # a longer LongLLaMA text moves to memory, up to a place that depends on its length
            self.longest = READ_AT_ONCE if model.shares else last_context_length(model)
        self.clear()

    def bytes_of(self, tokens: int) -> int:
        return tokens * self._token_bytes

    def start(self, count: int, room: int) -> None:
        self.clear()

    def clear(self) -> None:
        self.cache: Any = None
        self.real: Any = None  # which columns of the cache are tokens, [B, earlier T]

    def select(self, rows: Sequence[int]) -> None:
        self.cache.reorder_cache(torch.tensor(rows))
        self.real = self.real[rows]

    def read(self, texts: Sequence[np.ndarray], wanted: np.ndarray) -> torch.Tensor:
        lengths = np.array([len(text) for text in texts])[:, None]
        columns = np.arange(lengths.max())
        real = columns < lengths  # [B, T]
        ids = np.zeros(real.shape, np.int64)
        ids[real] = np.concatenate(texts)
        options = {}
        kept = self._tensor(np.flatnonzero(real)[wanted])
        if self.real is not None:  # at first, positions and the causal mask are right by themselves
            # those of padding are clipped: there may be no more positions than the model was made for
            positions = self.real.sum(1, keepdims=True) + np.minimum(columns, lengths - 1)
            real = np.concatenate((self.real, real), 1)
            options = {"attention_mask": self._tensor(real).long(), "position_ids": self._tensor(positions)}
        self.real = real
        with head_reads(self.model.get_output_embeddings(), kept):
            output = self.model(self._tensor(ids), past_key_values=self.cache, use_cache=self.branches, **options)
        if self.branches:
            self.cache = output.past_key_values
        return output.logits

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self.model.device)


Rows = PackedRows | PaddedRows


def new_rows(model: LanguageModel) -> Rows:
    """Rows as the model takes them."""
    return PackedRows(model) if isinstance(model.model, YocoForCausalLM) else PaddedRows(model)


def last_context_length(model: LanguageModel) -> int:
    """Up to so many tokens of a text, a LongLLaMA moves none to memory."""
    return model.read_options.get("last_context_length", model.model.config.last_context_length)


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
