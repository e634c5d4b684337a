"""The ways to split a module over ranks, for a family's tensor-parallel plan."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedConfig

ROWS = "rows"  # a linear layer by its outputs: a rank's heads or hidden units; nothing is exchanged
COLUMNS = "columns"  # by its inputs: sums over all heads or units, an all-reduce
EMBEDDING = "embedding"  # by vocabulary, looked up on all ranks
LOGITS = "logits"  # by vocabulary; the loss needs no logits of other ranks
WHOLE = "whole"  # a norm that all ranks compute alike, whose outputs' gradients are summed over the ranks
WHOLE_AT_THE_END = "whole, at the end"  # the same, where what comes out is no longer split over ranks


class Heads(NamedTuple):
    """A projection to `num` key or value heads of dimension `dim`: by heads, or whole where there are fewer than ranks,
    and each rank then takes the one head that its query heads read."""

    num: int
    dim: int


Split = str | Heads


def check_divides(config: PreTrainedConfig, ranks: int, *keys: str) -> None:
    """ValueError unless the ranks can share these numbers evenly."""
    for key in keys:
        if getattr(config, key) % ranks:
            raise ValueError(f"{key} {getattr(config, key)} does not divide among tensor_parallel {ranks} ranks.")


def check_heads(key: str, num_heads: int, ranks: int) -> None:
    """ValueError unless key/value heads are shared by ranks, or ranks by heads."""
    if num_heads % ranks and ranks % num_heads:
        raise ValueError(
            f"{key} {num_heads} neither divides among tensor_parallel {ranks} ranks nor divides their number."
        )
