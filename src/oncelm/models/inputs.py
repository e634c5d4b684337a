"""Turns what a caller passes (padded, packed or plain ids; labels) into a Batch and targets."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F

from oncelm.cache import Batch, Selection

IGNORE_INDEX = -100  # Hugging Face's mark of a target that does not count
# `logits_to_keep` for no logits at all: an index tensor, so that callers can ask for it too
NOTHING = torch.empty(0, dtype=torch.long)

# A cache holds no padding, and what it has read cannot be taken back: a mask says of earlier columns what it said then
HIDDEN_PAST = (
    "attention_mask hides tokens that the cache has taken in, or shows padding that it has not: its earlier columns "
    "must be those of the calls before. Sequences that ended before others in a batch cannot be gone on with by hiding "
    "what followed their end: read the whole text into a new cache."
)


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

    @classmethod
    def of_rows(cls, starts: tuple[int, ...], real: torch.Tensor | None, T: int, device: torch.device) -> Inputs:
        """B rows of T columns, of which `real` [B, T] are tokens (None: all), behind `starts` tokens each."""
        if real is None:
            return cls(Batch.dense(starts, T, device), None, T)
        return cls(Batch.packed(starts, tuple(real.sum(1).tolist()), device), real, T)

    @property
    def shape(self) -> tuple[int, int]:
        """[B, T] of the caller's grid."""
        if self.real is not None:
            return len(self.real), self.columns
        return (self.batch.num_sequences if self.batch.cu_seqlens is None else 1), self.columns

    def last_columns(self) -> torch.Tensor:
        """[B] the column of each row's last token."""
        if self.real is None:
            return torch.full((self.shape[0],), self.columns - 1, device=self.batch.positions.device)
        return (torch.arange(self.columns, device=self.real.device) * self.real).argmax(1)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, ...] on the caller's grid -> in the batch's layout."""
        return x if self.real is None else x[self.real][None]

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """x [1, total, d] or [B, T, d] in the batch's layout -> on the caller's grid, zeros at padding."""
        return spread(x, self.real)

    def select(self, mask: torch.Tensor) -> Selection:
        """The Selection of the positions marked in mask [B, T] over the caller's grid."""
        return self.batch.pick(mask if self.real is None else mask[self.real][None])


def spread(x: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """x [B, T, d], or packed [1, number of True, d], on the grid of real [B, T], with zeros where that is False."""
    if real is None or x.shape[:2] == real.shape:
        return x
    return x.new_zeros(*real.shape, x.shape[-1]).index_put((real,), x[0])


def read_inputs(
    shape: torch.Size,
    device: torch.device,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    starts: tuple[int, ...] | None,
    columns_before: int,
    position_ids: torch.Tensor | None = None,
) -> Inputs:
    """Describe a [B, T] grid of tokens.

    Args:
        attention_mask: [B, T], or [B, columns_before + T] as Hugging Face passes with a cache; 0 marks padding,
            anywhere.
        cu_seqlens: [N + 1] borders of sequences packed into one row.
        starts: tokens of each sequence that a cache holds; None means no cache.
        columns_before: columns of input that the cache has taken in.
        position_ids: [B, T] where the caller thinks that tokens are (`find_packing` checks its shape).
    """
    B, T = shape[0], shape[1]
    if T == 0 or B == 0:
        raise ValueError(f"input_ids is empty (shape {[B, T]}); give at least one token.")
    if cu_seqlens is not None:
        inputs = _read_packed(B, T, device, attention_mask, cu_seqlens, starts)
        if position_ids is not None and bool((position_ids != inputs.batch.positions).any()):
            raise ValueError("position_ids are not those of the sequences that cu_seqlens packs: each begins at 0.")
        return inputs
    if starts is not None and len(starts) != B:
        raise ValueError(f"the cache is for a batch of {len(starts)}, the input is a batch of {B}.")
    is_fresh, starts = starts is None, starts or (0,) * B
    real = None
    if attention_mask is not None:
        if attention_mask.shape not in ((B, T), (B, columns_before + T)):
            raise ValueError(
                f"attention_mask must be [B, T] = {[B, T]}"
                + (f" or [B, {columns_before + T}] with what the cache holds" if columns_before else "")
                + f", got {list(attention_mask.shape)}."
            )
        real = attention_mask[:, -T:] == 1
        if attention_mask.shape[1] > T:
            check_hidden_past(attention_mask[:, :-T], starts)
        is_full, is_mask = torch.stack((real.all(), (real | (attention_mask[:, -T:] == 0)).all())).tolist()
        if not is_mask:
            raise ValueError(
                "attention_mask must hold 1 at tokens and 0 at padding. Packed sequences are told by position_ids that "
                "begin at 0 in each, or by cu_seqlens."
            )
        if is_full:
            real = None
    if position_ids is not None:
        _check_places(position_ids, real, starts, is_fresh)
    return Inputs.of_rows(starts, real, T, device)


def check_hidden_past(mask: torch.Tensor, lengths: tuple[int, ...]) -> None:
    """ValueError unless the mask [B, columns] of what a cache has read shows as many tokens as it holds of each row."""
    if bool((mask.bool().sum(1) != _tensor(lengths, mask)).any()):
        raise ValueError(HIDDEN_PAST)


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
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.is_floating_point():
        raise ValueError(
            "cu_seqlens must be [N + 1] integers, the borders of N >= 1 packed sequences, got "
            f"{cu_seqlens.dtype} {list(cu_seqlens.shape)}."
        )
    bounds = cu_seqlens.tolist()
    if B != 1 or bounds[0] != 0 or bounds[-1] != T or sorted(bounds) != bounds:
        raise ValueError(
            f"cu_seqlens must rise from 0 to T = {T} for one row of input_ids, got {bounds[:8]}, {B} rows."
        )
    lengths = tuple(b - a for a, b in pairwise(bounds))
    if starts is not None and len(starts) != len(lengths):
        raise ValueError(f"cu_seqlens packs {len(lengths)} sequences, the cache has {len(starts)}.")
    return Inputs(Batch.packed(starts or (0,) * len(lengths), lengths, device), None, T)


def _tensor(counts: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(counts, device=like.device)


def find_packing(
    shape: torch.Size,
    device: torch.device,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    starts_anew: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """position_ids [B, T], attention_mask and cu_seqlens, with what position_ids say of packed sequences in the last.

    starts_anew: nothing came before, so that position 0 begins a sequence.
    """
    if position_ids is None:
        return None, attention_mask, cu_seqlens
    position_ids = _check_position_ids(position_ids, shape[0], shape[1], device)
    if starts_anew and cu_seqlens is None:
        cu_seqlens = _packed_borders(position_ids, attention_mask)
        if cu_seqlens is not None:
            return None, None, cu_seqlens
    return position_ids, attention_mask, cu_seqlens


def _check_position_ids(position_ids: torch.Tensor, B: int, T: int, device: torch.device) -> torch.Tensor:
    """position_ids as [B, T] on `device`; ValueError for another shape or dtype."""
    if position_ids.dim() == 1:
        position_ids = position_ids[None]
    if position_ids.dim() != 2 or position_ids.shape[0] not in (1, B) or position_ids.shape[1] != T:
        raise ValueError(f"position_ids must be [B, T] = {[B, T]} or [1, {T}], got {list(position_ids.shape)}.")
    if position_ids.is_floating_point() or position_ids.dtype == torch.bool:
        raise ValueError(f"position_ids must be integers, got {position_ids.dtype}.")
    return position_ids.to(device).long().expand(B, T)


def _packed_borders(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """cu_seqlens [N + 1] of the sequences that position_ids [B, T] count anew from 0; None for one sequence a row.

    Padding behind packed sequences becomes sequences of its own, which nobody sees.

    Raises:
        ValueError: several sequences in one of several rows, or a sequence that does not count 0, 1, 2, ...
    """
    B, T = position_ids.shape
    fits = attention_mask is not None and attention_mask.shape == position_ids.shape
    real = attention_mask.to(position_ids.device) != 0 if attention_mask is not None and fits else None
    seen = torch.ones_like(position_ids, dtype=torch.bool) if real is None else real
    together = seen[:, 1:] & seen[:, :-1]
    new = position_ids[:, 1:] != position_ids[:, :-1] + 1  # does not go on from the token before
    if not bool((new & together).any()):
        return None
    bad = new & together & (position_ids[:, 1:] != 0)
    if bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        before, here = position_ids[row, column : column + 2].tolist()
        raise ValueError(
            f"position_ids go from {before} to {here} in row {row}: they must count up by one, or begin anew at 0 "
            "where another packed sequence begins."
        )
    if B > 1:
        raise ValueError(
            f"position_ids begin anew within a row of a batch of {B}: packed sequences stand in one row, as "
            "DataCollatorWithFlattening makes it (input_ids [1, total])."
        )
    first = torch.cat((new.new_ones(1), (new | ~together)[0]))
    starts = first.nonzero().flatten()
    return torch.cat((starts, starts.new_tensor([T]))).to(torch.int32)


def _check_places(
    position_ids: torch.Tensor, real: torch.Tensor | None, starts: tuple[int, ...], is_fresh: bool
) -> None:
    """ValueError unless tokens are where position_ids [B, T] say, or, without anything before them, as far apart."""
    counted = position_ids.new_ones(position_ids.shape) if real is None else real.long()
    off = position_ids - (counted.cumsum(1) - 1) - _tensor(starts, position_ids)[:, None]
    if is_fresh:  # without a cache, which counts from 0, only distances count
        first = counted.argmax(1, keepdim=True)
        off = off - off.gather(1, first)
    wrong = (off != 0) & (counted != 0)
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        place = int(position_ids[row, column] - off[row, column])
        raise ValueError(
            f"position_ids has {int(position_ids[row, column])} in row {row}, column {column}; this token is number "
            f"{place} of its sequence. Positions count tokens (not padding) one by one from what the cache holds."
        )


def is_next_token(
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    lengths: tuple[int, ...],
    columns_before: int,
) -> bool:
    """Whether mask and positions of one new column say just that it is each sequence's next token. A GPU is waited for
    once, and asked for little: this stands before every step of `generate`."""
    said: list[torch.Tensor] = []
    expected: list[list[int]] = []
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[1] not in (1, columns_before + 1):
            return False
        said.append(attention_mask[:, -1])
        expected.append([1] * len(lengths))
        if attention_mask.shape[1] > 1:  # of the earlier columns as many as the cache holds
            said.append(attention_mask.sum(1))
            expected.append([length + 1 for length in lengths])
    if position_ids is not None:
        if position_ids.shape != (len(lengths), 1):
            return False
        said.append(position_ids[:, 0])
        expected.append(list(lengths))
    return not said or torch.stack([x.long() for x in said]).tolist() == expected


def outside(targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Where targets are neither in the vocabulary nor ignored."""
    return (targets != IGNORE_INDEX) & ((targets < 0) | (targets >= vocab_size))


def check_range(targets: torch.Tensor, vocab_size: int) -> None:
    """ValueError for a target that is neither in the vocabulary nor ignored."""
    wrong = outside(targets, vocab_size)
    if bool(wrong.any()):
        raise ValueError(f"labels has {int(targets[wrong][0])}; allowed: 0..{vocab_size - 1}, or -100 to ignore.")


def read_targets(
    labels: torch.Tensor | None, targets: torch.Tensor | None, inputs: Inputs, shape: torch.Size, vocab_size: int
) -> torch.Tensor:
    """[B, T] what each position predicts, IGNORE_INDEX for nothing, from one of the two.

    Args:
        labels: [B, T] as in Hugging Face, each at its own token; -100 is ignored. On the CPU where the batch is on a
            GPU, they stay there: what they ask for is then known without waiting for it.
        targets: [B, T] each at the token that predicts it.
    """
    given = labels if targets is None else targets
    assert given is not None
    if given.shape != shape[:2]:
        raise ValueError(f"labels must be [B, T] = {list(shape[:2])} as input_ids, got {list(given.shape)}.")
    if given.is_floating_point() or given.dtype == torch.bool:
        raise ValueError(f"labels must be integers, got {given.dtype}.")
    given = given.long() if inputs.real is None else given.to(inputs.real.device).long()
    if given.device.type == "cpu":  # a GPU's answer is waited for together with others: see `outside`
        check_range(given, vocab_size)
    if labels is None:
        return given if inputs.real is None else given.masked_fill(~inputs.real, IGNORE_INDEX)
    targets = F.pad(given[:, 1:], (0, 1), value=IGNORE_INDEX)
    if inputs.real is not None:
        targets = targets.masked_fill(~(inputs.real & F.pad(inputs.real[:, 1:], (0, 1))), IGNORE_INDEX)
    elif inputs.batch.cu_seqlens is not None:  # the last token of a packed sequence predicts nothing
        lasts = [end - 1 for end in accumulate(inputs.batch.lengths) if end]
        targets[0, torch.tensor(lasts).to(targets.device, non_blocking=True)] = IGNORE_INDEX
    return targets
