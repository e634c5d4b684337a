"""The cache of a YOCO: the past of each self-decoder layer, the shared K/V, and the length of each sequence.

Layers of the cross-decoder have nothing of their own in it, and nothing grows by concatenation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch

from oncelm.cache.base import RewindPoint, SequenceCache, Snapshot
from oncelm.cache.batch import HISTORY, Batch
from oncelm.cache.yoco.interface import LayerCache, Pasts
from oncelm.cache.yoco.shared_kv import SharedKV
from oncelm.ops.quantize import LARGEST, as_bytes


class YocoCache(SequenceCache):
    """Preallocated cache for `batch_size` sequences of up to `max_tokens` tokens (None: as many as come).

    Attributes:
        layers: the past of each self-decoder layer, as its mixer makes it.
        shared: the global key/value cache; None for a model without a cross-decoder.
        lengths: tokens held of each sequence (padding is never held).
    """

    after_failure = "call cache.reset(), or cache.restore(snapshot)."
    lengths: tuple[int, ...] = ()

    def __init__(
        self,
        layers: Sequence[LayerCache],
        shared: SharedKV | None,
        batch_size: int,
        max_tokens: int | None,
        made_for: Mapping[str, Any],
    ) -> None:
        super().__init__(layers, max_tokens, made_for)
        self.shared = shared
        self.lengths = (0,) * batch_size
        self._recording = False
        self._history: deque[Batch] = deque(maxlen=HISTORY)
        self._rewind_points: WeakSet[RewindPoint] = WeakSet()

    # -- what it holds --------------------------------------------------------------------------------------------

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def tensors(self) -> dict[str, torch.Tensor]:
        """All that it has allocated, by name: "layers.3.state", "shared.k"."""
        return self._in_use(None)

    def addresses(self) -> tuple[int, ...]:
        """Where each of them is, and how long the shared ones are: CUDA graphs are recorded anew when that has changed.
        Read at every step of decoding."""
        stores = self.layers if self.shared is None else (*self.layers, self.shared)
        capacity = 0 if self.shared is None else self.shared.k.shape[1]
        return capacity, *(getattr(store, part).data_ptr() for store in stores for part in store.tensor_names)

    def _stores(self) -> dict[str, LayerCache]:
        """All that holds tensors, by name."""
        stores = {f"layers.{i}": layer for i, layer in enumerate(self.layers)}
        return stores if self.shared is None else {**stores, "shared": self.shared}

    def _in_use(self, num_tokens: int | None, growing: bool = True) -> dict[str, torch.Tensor]:
        """The tensors, those of rows of tokens cut to the first `num_tokens`, or left out where not `growing`."""
        return {
            f"{name}.{part}": getattr(store, part)[:, :num_tokens] if store.grows else getattr(store, part)
            for name, store in self._stores().items()
            if growing or not store.grows
            for part in store.tensor_names
        }

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` a sequence."""
        for store in self._stores().values():
            store.reserve(num_tokens)

    def step_form(self) -> Pasts:
        """The past of one new token a sequence at positions that only the device knows, for CUDA graphs: an object on
        the tensors of each layer. Lengths are the caller's to check before, and to commit after."""
        shared = None if self.shared is None else self.shared.step_form()
        return Pasts([layer.step_form() for layer in self.layers], shared)

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors().values())).device

    # -- a forward pass -------------------------------------------------------------------------------------------

    def commit(self, batch: Batch, columns: int) -> None:
        """All layers have taken in `batch`, which stood in `columns` columns of input."""
        self.lengths = batch.ends
        self.columns += columns
        if self._recording:
            self._history.append(batch)
        self._running = False

    @property
    def recording(self) -> bool:
        """Whether forward passes can be undone (`record`)."""
        return self._recording

    # -- copies and returns ---------------------------------------------------------------------------------------

    def snapshot(self, shared: bool = True) -> Snapshot:
        """A copy to return to with `restore`.

        With `shared=False` keys and values of all tokens are not copied: a cheap rewind point for this cache alone
        (prefill a document once, ask it many questions). It stays valid until the cache is restored to, or cropped to,
        an earlier place.
        """
        self.check_whole()
        held = {name: tensor.clone() for name, tensor in self._in_use(self.num_tokens, shared).items()}
        point = None
        if not shared:
            point = RewindPoint(self.lengths)
            self._rewind_points.add(point)
        of_tokens = [getattr(store, store.tensor_names[0]) for store in self._stores().values() if store.grows]
        return Snapshot(held, self.lengths, self.columns, point, of_tokens[-1].dtype if of_tokens else None)

    def restore(self, snapshot: Snapshot) -> None:
        """Return to a snapshot of this cache, or of another one for the same model and batch size."""
        if snapshot.rewind_point is not None and snapshot.rewind_point not in self._rewind_points:
            raise ValueError(
                "this rewind point is of another cache, or its shared K/V was overwritten after a return to an "
                "earlier place; take it again, or use snapshot(shared=True)."
            )
        if len(snapshot.lengths) != self.batch_size:
            raise ValueError(f"the snapshot is of {len(snapshot.lengths)} sequences, the cache has {self.batch_size}.")
        longest = max(snapshot.lengths)
        if self.max_tokens is not None and longest > self.max_tokens:
            raise ValueError(f"the snapshot holds {longest} tokens, the cache at most {self.max_tokens}.")
        self.reserve(longest)
        mine = self._in_use(longest, snapshot.rewind_point is None)
        for name in mine.keys() & snapshot.tensors.keys():
            held, kept = snapshot.tensors[name].dtype, mine[name].dtype
            if held != kept and {held, kept} & {*LARGEST}:
                raise ValueError(
                    f"the snapshot's keys and values are {held}, the cache's {kept}: "
                    f"make the cache with model.new_cache(..., dtype={held})."
                )
        if mine.keys() != snapshot.tensors.keys():
            raise ValueError("the snapshot is of a cache with other layers than this one.")
        for name, saved in snapshot.tensors.items():
            if mine[name].shape != saved.shape:
                raise ValueError(
                    f"{name} of the snapshot is {tuple(saved.shape)}, of the cache {tuple(mine[name].shape)}."
                )
        for name, saved in snapshot.tensors.items():
            mine[name].copy_(saved)
        if snapshot.rewind_point is None:  # other keys and values may have taken the place of theirs
            self._rewind_points.clear()
        self._set_lengths(snapshot.lengths, snapshot.columns)
        self._forget_history()
        self._running = False

    def _set_lengths(self, lengths: tuple[int, ...], columns: int) -> None:
        self.lengths, self.columns = lengths, columns
        self._rewind_points = WeakSet(
            point for point in self._rewind_points if all(a <= b for a, b in zip(point.lengths, lengths, strict=True))
        )

    def reset(self) -> None:
        """Forget everything; the memory stays allocated."""
        # rows behind those in use have never been written, unless a forward pass failed: a masked key has weight 0,
        # but 0 times a NaN that an earlier text left there is NaN
        for tensor in self._in_use(None if self._running else self.num_tokens).values():
            as_bytes(tensor).zero_()
        self._set_lengths((0,) * self.batch_size, 0)
        self._forget_history()
        self._running = False

    # -- batch rows -----------------------------------------------------------------------------------------------

    def _select(self, index: torch.Tensor, rows: list[int]) -> None:
        for store in self._stores().values():
            store.select(index, self.num_tokens)
        self.lengths = tuple(self.lengths[row] for row in rows)
        self._rewind_points = WeakSet()
        self._forget_history()

    # -- undoing the last forward passes (speculative and assisted decoding) ---------------------------------------

    def record(self, on: bool = True) -> None:
        """Remember the inputs of each forward pass, so that `crop` can undo the last ones exactly.

        A recurrent state cannot be cropped, but it can be rebuilt: from a copy of the state before and the kept tokens.
        The last HISTORY passes are remembered, until the next `crop`.
        """
        self._recording = on
        self._forget_history()

    def _forget_history(self) -> None:
        self._history.clear()
        for layer in self.layers:
            layer.record(self._recording)

    def crop(self, tokens_to_remove: int) -> None:
        """Undo the last `abs(tokens_to_remove)` tokens of every sequence (Hugging Face passes them negative).

        Raises:
            ValueError: more than was taken in since `record()` or the last `crop`, or a cache whose forward pass failed
                midway; nothing has changed then.
        """
        self.check_whole()
        if not tokens_to_remove:
            return
        asked = remove = abs(int(tokens_to_remove))  # some transformers pass a tensor
        passes: list[tuple[Batch, int]] = []  # (the part of a forward pass to keep, columns to take back), latest first
        for batch in reversed(self._history):
            if remove == 0:
                break
            back = min(remove, *batch.lengths)
            if back < remove and len(set(batch.lengths)) > 1:
                break  # sequences of different lengths: the rest would come out of different passes
            lengths = tuple(length - back for length in batch.lengths)
            if batch.cu_seqlens is None:
                kept = Batch.dense(batch.starts, lengths[0], self.device)
            else:
                kept = Batch.packed(batch.starts, lengths, self.device)
            passes.append((kept, back))
            remove -= back
        if remove:
            raise ValueError(
                f"crop was asked to remove {asked} tokens and can undo {asked - remove}: "
                "turn cache.record() on before the forward passes to undo."
            )
        self.begin()
        for kept, back in passes:
            for layer in self.layers:
                layer.rewind(kept)
            self._set_lengths(kept.ends, self.columns - back)
        self._forget_history()
        self._running = False
