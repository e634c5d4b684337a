"""The cache of a LongLLaMA model: a local cache in every layer, a memory behind it in the memory layers.

Tokens are read window by window (`plan`). With an empty local cache, all but the last `last_context_length` tokens go
to memory, and the rest becomes the local cache. If later tokens would make the local cache longer than a window, all of
it moves to memory first (`spill`). Layers without memory drop what moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from oncelm.cache.base import SequenceCache, Snapshot
from oncelm.cache.batch import Batch
from oncelm.cache.longllama.knn import MemoryIndex
from oncelm.cache.longllama.local_kv import LocalKV
from oncelm.cache.longllama.memory_kv import MemoryKV
from oncelm.cache.longllama.remote import RemoteMemory

LongLayer = LocalKV | MemoryKV | RemoteMemory


@dataclass(frozen=True)
class Piece:
    """A planned window: its columns of the input, whether the local cache moves to memory first, `Segment.fate`."""

    columns: slice
    spill_first: bool
    fate: str


def plan(T: int, local: int, window: int, last_context_length: int, keep: bool) -> Iterator[Piece]:
    """Cut T new columns of input into windows, as LongLLaMA does.

    Args:
        local: columns in the local cache.
        window: longest local context, `max_position_embeddings`.
        last_context_length: columns at the end that stay out of memory.
        keep: whether there is a cache to keep the end in.
    """
    to_memory = max(T - last_context_length, 0)
    borders = [*range(0, to_memory, window), to_memory] if to_memory else [0]
    started_empty = local == 0
    for first, stop in zip(borders, [*borders[1:], T], strict=True):
        last = stop == T and first == to_memory
        spill_first = local > 0 and local + stop - first > window
        if started_empty:
            fate = "memory" if not last else "local" if keep else "dropped"
        else:
            fate = "local"
            local = stop - first if spill_first else local + stop - first
        yield Piece(slice(first, stop), spill_first, fate)


class LongLlamaCache(SequenceCache):
    """Cache for `batch_size` sequences of up to `max_tokens` tokens (None: as many as come).

    Attributes:
        layers: one LocalKV, MemoryKV or RemoteMemory a layer.
        remembered: tokens of each sequence in memory (padding is never held).
        local: tokens of each sequence in the local cache.
        local_columns: columns of (padded) input that the local cache holds.
        window: columns that the local cache holds at most.
    """

    after_failure = "make a new cache (model.new_cache(...)), and restore a snapshot into it if there is one."

    def __init__(
        self,
        layers: list[LongLayer],
        batch_size: int,
        max_tokens: int | None,
        window: int,
        made_for: Mapping[str, Any],
    ) -> None:
        super().__init__(layers, max_tokens, made_for)
        self.window = window
        self.remembered: tuple[int, ...] = (0,) * batch_size
        self.local: tuple[int, ...] = (0,) * batch_size
        self.local_columns = 0

    # -- what it holds --------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(a + b for a, b in zip(self.remembered, self.local, strict=True))

    def nbytes(self) -> int:
        return sum(layer.nbytes() for layer in self.layers)

    def recall(self) -> dict[int, float]:
        """Of a "knn" cache with `measure_recall`: layer -> share of what it found that is as near as the nearest."""
        stores = {i: getattr(layer, "store", None) for i, layer in enumerate(self.layers)}
        return {i: s.found / s.wanted for i, s in stores.items() if isinstance(s, MemoryIndex) and s.wanted}

    @property
    def device(self) -> torch.device:
        return self.layers[0].k.device

    # -- a forward pass -------------------------------------------------------------------------------------------

    def reserve(self, new_tokens: Sequence[int]) -> None:
        """Make room for each sequence's `new_tokens` in the memories on the device, once for all windows of a pass."""
        longest = max(held + new for held, new in zip(self.lengths, new_tokens, strict=True))
        for layer in self.layers:
            if isinstance(layer, MemoryKV):
                layer.reserve(longest)

    def commit(self) -> None:
        self._running = False

    def spill(self) -> None:
        """Move the local cache to memory."""
        for layer in self.layers:
            layer.spill(self.remembered, self.local)
        self.remembered, self.local, self.local_columns = self.lengths, (0,) * self.batch_size, 0

    def advance(self, batch: Batch, columns: int, fate: str) -> None:
        """All layers have taken in a window of `batch`, which stood in `columns` columns of input."""
        self.columns += columns
        if fate == "memory":
            self.remembered = tuple(a + b for a, b in zip(self.remembered, batch.lengths, strict=True))
        elif fate == "local":
            self.local = batch.ends
            self.local_columns += columns

    # -- copies and returns ---------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """A copy, for a new cache of the same model with memory of any kind; `save_snapshot` writes it to a file."""
        self.check_whole()
        tensors = {
            f"layers.{i}.{name}": tensor
            for i, layer in enumerate(self.layers)
            for name, tensor in layer.state(self.remembered, self.local).items()
        }
        tensors["remembered"], tensors["local"] = torch.tensor(self.remembered), torch.tensor(self.local)
        tensors["local_columns"] = torch.tensor([self.local_columns])
        kept = {layer.memory_dtype for layer in self.layers if not isinstance(layer, LocalKV)}  # one, or none
        return Snapshot(tensors, self.lengths, self.columns, kv_dtype=next(iter(kept), None))

    def restore(self, snapshot: Snapshot) -> None:
        """Take in a snapshot; the cache must be new.

        Raises:
            ValueError: the cache holds tokens, or the snapshot is of another batch size, other layers or heads, or too
                long; nothing has changed then.
        """
        if self.columns or self._running:
            raise ValueError("a snapshot is restored into a new cache: model.new_cache(...).")
        if len(snapshot.lengths) != self.batch_size:
            raise ValueError(f"the snapshot is of {len(snapshot.lengths)} sequences, the cache has {self.batch_size}.")
        if self.max_tokens is not None and max(snapshot.lengths) > self.max_tokens:
            raise ValueError(f"the snapshot holds {max(snapshot.lengths)} tokens, the cache at most {self.max_tokens}.")
        empty = ((0,) * self.batch_size, (0,) * self.batch_size)
        states = (layer.state(*empty) for layer in self.layers)
        here = {f"layers.{i}.{name}": x for i, state in enumerate(states) for name, x in state.items()}
        if {*here, "remembered", "local", "local_columns"} != set(snapshot.tensors):
            raise ValueError("the snapshot is of a cache with other layers than this one.")
        for name, own in here.items():
            heads, theirs = own.shape[2:], snapshot.tensors[name].shape[2:]
            if heads != theirs:
                raise ValueError(f"{name} of the snapshot has heads of {tuple(theirs)}, the cache of {tuple(heads)}.")
        remembered, local = (tuple(snapshot.tensors[name].tolist()) for name in ("remembered", "local"))
        self.begin()
        for i, layer in enumerate(self.layers):
            prefix = f"layers.{i}."
            own = {name.removeprefix(prefix): x for name, x in snapshot.tensors.items() if name.startswith(prefix)}
            layer.load(own, remembered, local)
        self.remembered, self.local = remembered, local
        self.columns, self.local_columns = snapshot.columns, int(snapshot.tensors["local_columns"])
        self.commit()

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the last `abs(tokens_to_remove)` tokens of every sequence (Hugging Face passes them negative).

        Raises:
            ValueError: some of them are in memory already; nothing has changed then.
        """
        self.check_whole()
        remove = abs(int(tokens_to_remove))
        if remove > min(self.local):
            raise ValueError(
                f"crop was asked to remove {remove} tokens, but only {min(self.local)} are in the local cache; "
                "what has moved to memory stays there."
            )
        self.local = tuple(count - remove for count in self.local)
        self.columns -= remove
        self.local_columns -= remove

    # -- batch rows -----------------------------------------------------------------------------------------------

    def _select(self, index: torch.Tensor, rows: list[int]) -> None:
        for layer in self.layers:
            layer.keep_rows(index, self.remembered, self.local)
        self.remembered = tuple(self.remembered[row] for row in rows)
        self.local = tuple(self.local[row] for row in rows)
