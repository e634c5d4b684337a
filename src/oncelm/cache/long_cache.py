"""The cache of a LongLLaMA model: a local cache in every layer, a memory behind it in the memory layers.

It is a `transformers.Cache`, so Hugging Face `generate` takes it as `past_key_values`.

Tokens are taken in by windows (`plan`). Into an empty local cache, all but the last `last_context_length` tokens go to
memory, window by window, and the rest becomes the local cache. When a later window would make the local cache longer
than a window, all that it held before moves to memory first. Layers without memory forget what moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import Cache

from oncelm.cache.batch import Batch
from oncelm.cache.local_kv import LocalKV
from oncelm.cache.memory_knn import MemoryIndex
from oncelm.cache.memory_kv import MemoryKV
from oncelm.cache.memory_remote import RemoteMemory
from oncelm.cache.model_cache import Snapshot

LongLayer = LocalKV | MemoryKV | RemoteMemory


@dataclass(frozen=True)
class Piece:
    """A window to be: columns of the input, whether the local cache moves to memory first, and the window's fate."""

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


class LongLlamaCache(Cache):
    """Cache for `batch_size` sequences of up to `max_tokens` tokens (None: as many as come).

    Attributes:
        layers: one LocalKV, MemoryKV or RemoteMemory a layer.
        remembered: tokens of each sequence in memory (padding is never held).
        local: tokens of each sequence in the local cache.
        columns, local_columns: columns of (padded) input taken in so far, and those of the local cache.
        window: columns that the local cache holds at most.
    """

    def __init__(self, layers: list[LongLayer], batch_size: int, max_tokens: int | None, window: int) -> None:
        super().__init__(layers=layers)
        self.max_tokens, self.window = max_tokens, window
        self.remembered: tuple[int, ...] = (0,) * batch_size
        self.local: tuple[int, ...] = (0,) * batch_size
        self.columns = self.local_columns = 0
        self._running = False  # between begin and commit; still set when a forward pass failed midway

    # -- what it holds --------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return len(self.local)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens taken in of each sequence."""
        return tuple(a + b for a, b in zip(self.remembered, self.local, strict=True))

    @property
    def num_tokens(self) -> int:
        """Tokens taken in of the longest sequence."""
        return max(self.lengths)

    def nbytes(self) -> int:
        """Bytes allocated, used or not, wherever they are."""
        return sum(layer.nbytes() for layer in self.layers)

    def recall(self) -> dict[int, float]:
        """Of a "knn" cache with `measure_recall`: layer -> share of the true nearest keys that its index found."""
        stores = {i: getattr(layer, "store", None) for i, layer in enumerate(self.layers)}
        return {i: s.found / s.wanted for i, s in stores.items() if isinstance(s, MemoryIndex) and s.wanted}

    @property
    def device(self) -> torch.device:
        return self.layers[0].k.device

    def __repr__(self) -> str:
        capacity = "growing" if self.max_tokens is None else f"{self.max_tokens} tokens"
        return (
            f"LongLlamaCache({self.batch_size} x {capacity}, memory {list(self.remembered)}, local {list(self.local)}, "
            f"{self.nbytes() / 2**20:.1f} MiB)"
        )

    # -- a forward pass -------------------------------------------------------------------------------------------

    def check_room(self, new_tokens: int) -> None:
        """ValueError unless every sequence can take `new_tokens` more."""
        if self._running:
            raise ValueError(
                "an earlier forward pass on this cache failed midway, so its state is undefined: make a new cache "
                "(model.new_cache(...)), and restore a snapshot into it if there is one."
            )
        if self.max_tokens is not None and self.num_tokens + new_tokens > self.max_tokens:
            raise ValueError(
                f"the cache holds at most {self.max_tokens} tokens a sequence and has {self.num_tokens}; "
                f"{new_tokens} more do not fit. Make it larger: model.new_cache({self.batch_size}, max_tokens=...)."
            )

    def reserve(self, new_tokens: int) -> None:
        """Make room for `new_tokens` more in the memories on the device, once for all windows of a pass."""
        for layer in self.layers:
            if isinstance(layer, MemoryKV):
                layer.reserve(self.num_tokens + new_tokens)

    def begin(self) -> None:
        """Mark that layers are about to change; until `commit`, a failure leaves the cache unusable, not wrong."""
        self._running = True

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
        assert not self._running, "snapshot of a cache whose forward pass failed"
        tensors = {
            f"layers.{i}.{name}": tensor
            for i, layer in enumerate(self.layers)
            for name, tensor in layer.state(self.remembered, self.local).items()
        }
        tensors["remembered"], tensors["local"] = torch.tensor(self.remembered), torch.tensor(self.local)
        tensors["local_columns"] = torch.tensor([self.local_columns])
        return Snapshot(tensors, self.lengths, self.columns)

    def restore(self, snapshot: Snapshot) -> None:
        """Take in a snapshot; the cache must be new.

        Raises:
            ValueError: the cache holds tokens, or the snapshot is of another batch size or other layers, or too long.
        """
        if self.columns or self._running:
            raise ValueError("a snapshot is restored into a new cache: model.new_cache(...).")
        if len(snapshot.lengths) != self.batch_size:
            raise ValueError(f"the snapshot is of {len(snapshot.lengths)} sequences, the cache has {self.batch_size}.")
        if self.max_tokens is not None and max(snapshot.lengths) > self.max_tokens:
            raise ValueError(f"the snapshot holds {max(snapshot.lengths)} tokens, the cache at most {self.max_tokens}.")
        here = {f"layers.{i}.{name}" for i, layer in enumerate(self.layers) for name in layer.state(*self._empty())}
        if here | {"remembered", "local", "local_columns"} != set(snapshot.tensors):
            raise ValueError("the snapshot is of a cache with other layers than this one.")
        remembered, local = (tuple(snapshot.tensors[name].tolist()) for name in ("remembered", "local"))
        self.begin()
        for i, layer in enumerate(self.layers):
            prefix = f"layers.{i}."
            own = {name.removeprefix(prefix): x for name, x in snapshot.tensors.items() if name.startswith(prefix)}
            layer.load(own, remembered, local)
        self.remembered, self.local = remembered, local
        self.columns, self.local_columns = snapshot.columns, int(snapshot.tensors["local_columns"])
        self.commit()

    def _empty(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (0,) * self.batch_size, (0,) * self.batch_size

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the last `abs(tokens_to_remove)` tokens of every sequence (Hugging Face passes them negative).

        Raises:
            ValueError: some of them are in memory already; nothing has changed then.
        """
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

    def select(self, rows: Sequence[int] | torch.Tensor) -> None:
        """Keep sequences `rows`, in that order, with repeats (beam search, dropping finished sequences)."""
        index = torch.as_tensor(rows, device=self.device, dtype=torch.long)
        chosen = index.tolist()
        if not chosen or min(chosen) < 0 or max(chosen) >= self.batch_size:
            raise ValueError(f"rows must be in 0..{self.batch_size - 1} and at least one, got {chosen}.")
        if chosen == list(range(self.batch_size)):
            return
        for layer in self.layers:
            layer.keep_rows(index, self.remembered, self.local)
        self.remembered = tuple(self.remembered[row] for row in chosen)
        self.local = tuple(self.local[row] for row in chosen)

    # -- names that Hugging Face generate calls -------------------------------------------------------------------

    is_compileable = False
    is_initialized = True
    is_croppable = True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of (padded) input taken in so far."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.max_tokens is None else self.max_tokens

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.get_max_length()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select([row for row in range(self.batch_size) for _ in range(repeats)])

    def activate_past_recording(self) -> None:
        """Nothing to record: the local cache can be cropped as it is."""
