"""A LongLLaMA's own arguments of a forward pass: what becomes memory, where it is kept, and crossbatch."""

from __future__ import annotations

from typing import Any

import torch

from oncelm.models.longllama.config import LongLlamaConfig
from oncelm.models.longllama.memories import MEMORIES
from oncelm.ops.crossbatch import earlier_contexts
from oncelm.utils.errors import check_choice, check_whole


def check_arguments(
    config: LongLlamaConfig,
    training: bool,
    own: dict[str, Any],
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_packed: bool,
    cache: Any,
    use_cache: bool,
) -> dict[str, Any]:
    """`last_context_length`, `memory` and `counts` (of crossbatch: the rows before it that each row sees) of a pass.

    Args:
        training: of the model; crossbatch is then as the configuration says, where `own` says nothing.
        own: the arguments that are given.

    The others are those of `BaseModel._check_own`.

    Raises:
        ValueError: they do not fit each other.
    """
    counts = _crossbatch(config, training and cache is None, own, tokens, attention_mask, cache)
    if counts is not None and (use_cache or is_packed):
        raise ValueError("crossbatch is a way of training: it goes without use_cache and packed sequences.")
    if is_packed and (cache is not None or use_cache):
        raise ValueError(
            "packed sequences (cu_seqlens, position_ids that begin anew) are read without past_key_values and "
            "use_cache; a LongLLaMA's cache takes rows."
        )
    memory = own.get("memory")
    if memory is not None:
        check_choice("memory", memory, MEMORIES)
        trains = counts is not None or (torch.is_grad_enabled() and not use_cache)
        if cache is not None or trains:
            where = "past_key_values has one already" if cache is not None else "a pass with gradients has none"
            raise ValueError(f"memory={memory!r} is the kind of the cache that a call makes; {where}.")
    last = check_last_context(config, own.get("last_context_length"))
    return {"counts": counts, "memory": memory or "exact", "last_context_length": last}


def check_last_context(config: LongLlamaConfig, given: int | None) -> int:
    """The columns at the end that stay out of memory, the configuration's where none are given."""
    length = config.last_context_length if given is None else given
    assert length is not None, "the configuration sets it"
    check_whole(1, last_context_length=length)
    if length > config.max_position_embeddings:
        raise ValueError(
            f"last_context_length must be from 1 to the window of {config.max_position_embeddings}, got {length}."
        )
    return length


def _crossbatch(
    config: LongLlamaConfig,
    by_default: bool,
    own: dict[str, Any],
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Any,
) -> tuple[int, ...] | None:
    """How many rows before it each row sees; None without crossbatch."""
    earlier = own.get("cross_batch_range", config.cross_batch_range if by_default else None)
    if earlier is None:
        return None
    check_whole(0, cross_batch_range=earlier)
    if earlier == 0:
        return None
    B, T = tokens.shape[:2]
    if not config.mem_layers:
        raise ValueError("crossbatch needs memory layers; this model's mem_layers is empty.")
    if cache is not None:
        raise ValueError("crossbatch is a way of training: it goes without past_key_values.")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("crossbatch takes full rows only; put documents side by side instead of padding them.")
    if config.max_position_embeddings < T:
        raise ValueError(
            f"a row of crossbatch is one context: at most {config.max_position_embeddings} tokens "
            f"(max_position_embeddings), got {T}."
        )
    stepping = own.get("cross_batch_stepping", config.cross_batch_stepping)
    return earlier_contexts(B, earlier, stepping, own.get("dataset_packing", config.dataset_packing))
