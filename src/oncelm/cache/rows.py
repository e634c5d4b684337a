"""Preallocated tensors with a row for each token, written in place; they are copied only where they must grow."""

from __future__ import annotations

import torch

from oncelm.ops.quantize import as_bytes
from oncelm.utils.memory import checked_zeros


class Rows:
    """Tensors [N, S, H_kv, D], named in `tensor_names`, for N sequences of up to S tokens.

    With `max_tokens=None` the capacity S grows by `growth` when it is exceeded; otherwise it is fixed, and whoever owns
    them refuses longer input.
    """

    tensor_names: tuple[str, ...] = ("k", "v")
    first_capacity = 256
    growth = 2.0
    k: torch.Tensor
    v: torch.Tensor

    def __init__(
        self,
        batch_size: int,
        max_tokens: int | None,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch_size, self.first_capacity if max_tokens is None else max_tokens, num_kv_heads, head_dim)
        for name in self.tensor_names:
            setattr(self, name, self._allocate(shape, dtype, device))

    @staticmethod
    def _allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A tensor [N, S, H_kv, ...] that lies in memory head by head.

        Decoding reads one head's rows after the other; on a CPU it is up to twice as fast when they are neighbours.
        """
        N, S, H_kv, *rest = shape
        # zeros, not empty: a masked key has weight 0, and 0 times a NaN of uninitialised memory is NaN
        what = f"a cache of {S:,} tokens"
        return checked_zeros((N, H_kv, S, *rest), dtype, device, what).transpose(1, 2)

    @property
    def capacity(self) -> int:
        """Tokens that fit in each sequence."""
        return getattr(self, self.tensor_names[0]).shape[1]

    def reserve(self, num_tokens: int) -> None:
        """Make room for `num_tokens` a sequence; growth is by a factor, so copies stay linear in all."""
        if num_tokens <= self.capacity:
            return
        capacity = self.capacity
        for name in self.tensor_names:
            old = getattr(self, name)
            shape = (old.shape[0], max(num_tokens, int(self.growth * capacity)), *old.shape[2:])
            new = self._allocate(shape, old.dtype, old.device)
            new[:, :capacity] = old
            setattr(self, name, new)

    def select(self, index: torch.Tensor, num_tokens: int) -> None:
        """Keep sequences `index` [M], of which `num_tokens` rows are in use; in place where M is N."""
        for name in self.tensor_names:
            old = getattr(self, name)
            new = old if len(index) == len(old) else self._allocate((len(index), *old.shape[1:]), old.dtype, old.device)
            as_bytes(new)[:, :num_tokens] = as_bytes(old)[index, :num_tokens]
            setattr(self, name, new)

    def nbytes(self) -> int:
        """Bytes allocated, used or not."""
        return sum(getattr(self, name).nbytes for name in self.tensor_names)
