"""From what a caller passes (padded, packed or plain ids; wanted logits; labels) to a Batch and a Selection."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from oncelm.cache import Batch, Selection

IGNORE_INDEX = -100  # Hugging Face's mark of a target that does not count


@dataclass(frozen=True)
class Inputs:
    """Tokens ready to compute.

    Attributes:
        batch: the sequences; dense [B, T], or packed [1, total] with padding already left out.
        real: [B, T] booleans over the caller's grid, True at tokens, None where there is no padding.
        columns: T, columns of the caller's input.
    """

    batch: Batch
    real: torch.Tensor | None
    columns: int

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, ...] on the caller's grid -> in the batch's layout."""
        return x if self.real is None else x[self.real][None]

    def select(self, mask: torch.Tensor) -> Selection:
        """The Selection of the positions marked in mask [B, T] over the caller's grid."""
        return self.batch.pick(mask if self.real is None else mask[self.real][None])


def read_inputs(
    shape: torch.Size,
    device: torch.device,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    starts: tuple[int, ...] | None,
    columns_before: int,
) -> Inputs:
    """Describe a [B, T] grid of tokens.

    Args:
        attention_mask: [B, T], or [B, columns_before + T] as Hugging Face passes with a cache; 0 marks padding,
            anywhere.
        cu_seqlens: [N + 1] borders of sequences packed into one row.
        starts: tokens of each sequence that a cache holds; None means no cache.
        columns_before: columns of input that the cache has taken in.
    """
    B, T = shape[0], shape[1]
    if T == 0 or B == 0:
        raise ValueError(f"input_ids is empty (shape {[B, T]}); give at least one token.")
    if cu_seqlens is not None:
        return _read_packed(B, T, device, attention_mask, cu_seqlens, starts)
    if starts is not None and len(starts) != B:
        raise ValueError(f"the cache is for a batch of {len(starts)}, the input is a batch of {B}.")
    starts = starts or (0,) * B
    real = None
    if attention_mask is not None:
        if attention_mask.shape not in ((B, T), (B, columns_before + T)):
            raise ValueError(
                f"attention_mask must be [B, T] = {[B, T]}"
                + (f" or [B, {columns_before + T}] with what the cache holds" if columns_before else "")
                + f", got {list(attention_mask.shape)}."
            )
        real = attention_mask[:, -T:].bool()
        if bool(real.all()):
            real = None
    if real is None:
        return Inputs(Batch.dense(starts, T, device), None, T)
    return Inputs(Batch.packed(starts, tuple(real.sum(1).tolist()), device), real, T)


def _read_packed(
    B: int,
    T: int,
    device: torch.device,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    starts: tuple[int, ...] | None,
) -> Inputs:
    if attention_mask is not None:
        raise ValueError("give attention_mask (padded rows) or cu_seqlens (packed rows), not both.")
    bounds = cu_seqlens.tolist()
    if B != 1 or bounds[0] != 0 or bounds[-1] != T or sorted(bounds) != bounds:
        raise ValueError(
            f"cu_seqlens must rise from 0 to T = {T} for one row of input_ids, got {bounds[:8]}, {B} rows."
        )
    lengths = tuple(b - a for a, b in pairwise(bounds))
    if starts is not None and len(starts) != len(lengths):
        raise ValueError(f"cu_seqlens packs {len(lengths)} sequences, the cache has {len(starts)}.")
    return Inputs(Batch.packed(starts or (0,) * len(lengths), lengths, device), None, T)


def wanted_columns(logits_to_keep: int | torch.Tensor | None, T: int, device: torch.device) -> slice | torch.Tensor:
    """`logits_to_keep` as columns: None or 0 all, n the last n, a vector of indices those (negative: from the end)."""
    if logits_to_keep is None:
        return slice(0, T)
    if not isinstance(logits_to_keep, torch.Tensor):
        if logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be 0 (all), a count, or an index tensor, got {logits_to_keep}.")
        return slice(max(0, T - logits_to_keep), T) if logits_to_keep else slice(0, T)
    if logits_to_keep.dim() == 0:
        return wanted_columns(int(logits_to_keep), T, device)
    if logits_to_keep.dim() != 1 or logits_to_keep.dtype == torch.bool or logits_to_keep.is_floating_point():
        raise ValueError(
            "logits_to_keep must be an int, a vector of column indices or a [B, T] mask of booleans, got "
            f"{logits_to_keep.dtype} of shape {list(logits_to_keep.shape)}."
        )
    index = logits_to_keep.to(device)
    if index.numel() and (int(index.min()) < -T or int(index.max()) >= T):
        raise ValueError(f"logits_to_keep has indices outside -{T}..{T - 1}: {index.tolist()[:8]}.")
    return index % T


def check_mask(mask: torch.Tensor, inputs: Inputs, shape: torch.Size) -> torch.Tensor:
    """A [B, T] boolean `logits_to_keep`, refused where it asks for padding."""
    if mask.shape != shape[:2]:
        raise ValueError(f"a boolean logits_to_keep must be [B, T] = {list(shape[:2])}, got {list(mask.shape)}.")
    if inputs.real is not None and bool((mask & ~inputs.real).any()):
        raise ValueError("logits_to_keep asks for positions that attention_mask says are padding.")
    return mask


def read_targets(
    labels: torch.Tensor | None, targets: torch.Tensor | None, inputs: Inputs, shape: torch.Size, vocab_size: int
) -> torch.Tensor:
    """[B, T] what each position predicts, IGNORE_INDEX for nothing, from one of the two.

    Args:
        labels: [B, T] as in Hugging Face, each at its own token; -100 is ignored.
        targets: [B, T] each at the token that predicts it.
    """
    given = labels if targets is None else targets
    assert given is not None
    if given.shape != shape[:2]:
        raise ValueError(f"labels must be [B, T] = {list(shape[:2])} as input_ids, got {list(given.shape)}.")
    if given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {given.dtype}.")
    given = given.long()
    if given.device.type == "cpu":  # on a GPU the answer would have to be waited for in every training step
        outside = (given != IGNORE_INDEX) & ((given < 0) | (given >= vocab_size))
        if bool(outside.any()):
            raise ValueError(f"labels has {given[outside][0]}; allowed: 0..{vocab_size - 1}, or -100 to ignore.")
    if labels is None:
        return given if inputs.real is None else given.masked_fill(~inputs.real, IGNORE_INDEX)
    targets = F.pad(given[:, 1:], (0, 1), value=IGNORE_INDEX)
    if inputs.real is not None:
        targets = targets.masked_fill(~(inputs.real & F.pad(inputs.real[:, 1:], (0, 1))), IGNORE_INDEX)
    elif inputs.batch.cu_seqlens is not None:  # the last token of a packed sequence predicts nothing
        lasts = inputs.batch.cu_seqlens[1:].long() - 1
        targets[0, lasts[lasts >= 0]] = IGNORE_INDEX
    return targets
