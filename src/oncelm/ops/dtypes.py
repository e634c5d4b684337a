"""One dtype for the inputs of an op that multiplies them with each other."""

from __future__ import annotations

import torch


def one_dtype(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, all in the widest of their dtypes; autocast, where it is on, chooses for itself."""
    if torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    wide = tensors[0].dtype
    for x in tensors[1:]:
        wide = torch.promote_types(wide, x.dtype)
    return tuple(x.to(wide) for x in tensors)
