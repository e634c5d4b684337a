"""The local cache of one LongLLaMA layer without memory: keys and values since the window's start."""

from __future__ import annotations

import torch

from oncelm.cache.longllama.segment import Segment
from oncelm.cache.rows import Rows
from oncelm.ops import global_attention


class LocalKV(Rows):
    """k, v [N, S, H_kv, D], keys rotated by their position in the window; forgotten when the window moves on."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, raw_k: torch.Tensor, v: torch.Tensor, segment: Segment
    ) -> torch.Tensor:
        """Outputs [B, T, H, D] of the window's tokens; q [B, T, H, D] and k [B, T, H_kv, D] rotated, raw_k unused."""
        dtype = q.dtype
        q, k, v = (x.to(self.k.dtype) for x in (q, k, v))  # autocast computes in another dtype than the model's
        self.reserve(max(segment.batch.ends) if segment.fate == "local" else 0)
        outputs = []
        for group in segment.batch.groups():
            queries, keys, values = (x[group.where] for x in (q, k, v))
            if segment.fate == "local":
                span = slice(group.start, group.start + group.length)
                self.k[group.rows, span], self.v[group.rows, span] = keys, values
            if group.start:
                keys, values = self.k[group.rows], self.v[group.rows]
            outputs.append(global_attention(queries, keys, values, start=group.start))
        return segment.batch.join(outputs).to(dtype)

    def spill(self, remembered: tuple[int, ...], local: tuple[int, ...]) -> None:
        """The window moves on: nothing to do, rows are overwritten."""

    def state(self, remembered: tuple[int, ...], local: tuple[int, ...]) -> dict[str, torch.Tensor]:
        """Copies of what is in use, by name."""
        return {name: getattr(self, name)[:, : max(local)].clone() for name in self.tensor_names}

    def load(self, state: dict[str, torch.Tensor], remembered: tuple[int, ...], local: tuple[int, ...]) -> None:
        """Take in what `state` gave."""
        self.reserve(max(local))
        for name in self.tensor_names:
            getattr(self, name)[:, : max(local)] = state[name]

    def keep_rows(self, index: torch.Tensor, remembered: tuple[int, ...], local: tuple[int, ...]) -> None:
        """Keep sequences `index` [M], in that order."""
        self.select(index, max(local))


class RawKeys(Rows):
    """Keys of a memory layer's local cache before rotation: what memory takes in when the window moves on."""

    tensor_names = ("raw",)
    raw: torch.Tensor
