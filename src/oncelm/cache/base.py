"""What the caches of all models share: the lengths of N sequences, room for more tokens, and selection of rows.

A cache is a `transformers.Cache`, so Hugging Face `generate` takes it as `past_key_values`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache


@dataclass(frozen=True, eq=False)
class RewindPoint:
    """A place of one cache whose shared K/V were not copied: valid for as long as that cache knows it."""

    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Snapshot:
    """A copy of a cache at one moment: `tensors` by name ("layers.3.state", "shared.k" [N, tokens, H_kv, D]).

    `kv_dtype` is what the global cache or the memory stores; a LongLLaMA's int8 stands in `tensors` as float32.
    `tensors` has no shared K/V with a rewind point (`snapshot(shared=False)`), which only its own cache can return to.
    """

    tensors: dict[str, torch.Tensor]
    lengths: tuple[int, ...]
    columns: int
    rewind_point: RewindPoint | None = None
    kv_dtype: torch.dtype | None = None


class SequenceCache(Cache):
    """N sequences of up to `max_tokens` tokens (None: as many as come).

    Attributes:
        layers: what each layer of the model remembers.
        made_for: the configuration keys on which its sizes depend, with the values of the model that made it.
        columns: columns of padded input taken in so far; equals the lengths when nothing was padded.
    """

    after_failure: str  # what helps when a forward pass has failed midway

    def __init__(self, layers: Sequence[Any], max_tokens: int | None, made_for: Mapping[str, Any]) -> None:
        super().__init__(layers=list(layers))
        self.max_tokens, self.made_for = max_tokens, made_for
        self.columns = 0
        self._running = False  # between begin and the end of a change; still set when that failed midway

    # -- what it holds --------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens taken in of each sequence (padding is never held)."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens taken in of the longest sequence."""
        return max(self.lengths)

    def nbytes(self) -> int:
        """Bytes allocated, used or not, wherever they are."""
        raise NotImplementedError

    def __repr__(self) -> str:
        capacity = "growing" if self.max_tokens is None else f"{self.max_tokens} tokens"
        held, size = list(self.lengths), self.nbytes() / 2**20
        return f"{type(self).__name__}({self.batch_size} x {capacity}, holds {held}, {size:.1f} MiB)"

    # -- a forward pass -------------------------------------------------------------------------------------------

    def check_whole(self) -> None:
        """ValueError if a forward pass or `select` failed midway: some layers are behind it, others are not."""
        if self._running:
            raise ValueError(
                f"an earlier call on this cache failed midway, so its state is undefined: {self.after_failure}"
            )

    def check_room(self, new_tokens: Sequence[int]) -> None:
        """ValueError unless the cache is whole and each sequence can take its number of `new_tokens` more."""
        self.check_whole()
        for held, new in zip(self.lengths, new_tokens, strict=True):
            if self.max_tokens is not None and held + new > self.max_tokens:
                raise ValueError(
                    f"the cache holds at most {self.max_tokens} tokens a sequence and has {held}; {new} more do not "
                    f"fit. Make it larger: model.new_cache({self.batch_size}, max_tokens=...)."
                )

    def begin(self) -> None:
        """Mark that layers are about to change; until the end is marked too, a failure leaves the cache unusable."""
        self._running = True

    # -- undoing the last forward passes (speculative and assisted decoding) ---------------------------------------

    def record(self, on: bool = True) -> None:
        """Remember what `crop` needs to undo the next forward passes; nothing, where tokens are what is kept."""

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the last `abs(tokens_to_remove)` tokens of every sequence (Hugging Face passes them negative)."""
        raise NotImplementedError

    def activate_past_recording(self) -> None:
        self.record()

    # -- batch rows -----------------------------------------------------------------------------------------------

    def select(self, rows: Sequence[int] | torch.Tensor) -> None:
        """Keep sequences `rows`, in that order, with repeats (beam search, dropping finished sequences).

        Raises:
            ValueError: no rows, others than the cache has, or a cache on which a call failed midway.
            OSError, RuntimeError: no room for the new rows; the cache is of no use then.
        """
        self.check_whole()
        given = torch.as_tensor(rows, device=self.device)
        chosen = given.tolist()
        if given.dim() != 1 or not chosen or given.is_floating_point() or given.dtype == torch.bool:
            raise ValueError(f"rows must be a vector of at least one row number, got {chosen}.")
        if min(chosen) < 0 or max(chosen) >= self.batch_size:
            raise ValueError(f"rows must be in 0..{self.batch_size - 1}, got {chosen}.")
        if chosen != list(range(self.batch_size)):
            self.begin()
            self._select(given.long(), chosen)
            self._running = False

    def _select(self, index: torch.Tensor, rows: list[int]) -> None:
        """Keep sequences `index` [M], which is `rows` on the device."""
        raise NotImplementedError

    # -- names that Hugging Face generate calls -------------------------------------------------------------------

    is_compileable = False  # generate compiles forward itself only for its own static caches
    is_initialized = True
    is_croppable = True

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of (padded) input taken in so far."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.max_tokens is None else self.max_tokens

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.get_max_length()

    @property
    def max_cache_len(self) -> int:
        return self.get_max_length()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select([row for row in range(self.batch_size) for _ in range(repeats)])
