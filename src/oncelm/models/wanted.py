"""The wanted positions of a forward pass, and how loss and logits are computed from their hidden states.

A model computes positions in one piece (a YOCO, just the wanted ones) or window by window (a LongLLaMA). The hidden
states of the wanted positions in some columns are handed to `Wanted`, which brings them into the order asked for.
"""

from __future__ import annotations

import torch

from oncelm.cache import Selection
from oncelm.models.inputs import IGNORE_INDEX, NOTHING, Inputs, check_range, outside

Keep = int | torch.Tensor | None


def is_nothing(keep: Keep, training: bool) -> bool:
    """Whether a pass with labels returns no logits: asked for, or in training, where nobody said otherwise."""
    if isinstance(keep, torch.Tensor):
        return keep.dim() == 1 and keep.numel() == 0
    return keep is None and training


class Wanted:
    """The positions of a [B, T] grid of tokens whose hidden states are wanted, for a loss, for logits, or for both.

    They are whole columns where that is enough (no padding, no packed sequences), else any positions. For a loss alone,
    targets on the CPU are read there, so that nothing waits for a GPU.

    Args:
        inputs: the tokens.
        keep: the positions for logits: None or 0 all, n the last n columns, a vector the columns at these indices
            (negative: from the end), a [B, T] mask of booleans. NOTHING, with targets: none.
        targets: [B, T] what each position predicts, IGNORE_INDEX for nothing. None: no loss.
        vocab_size: of the targets.
        everywhere: the model computes all positions, for what else is asked of them.

    Attributes:
        num_targets: targets of the hidden states handed over so far.

    Raises:
        ValueError: `keep` asks for what is not there, or a target is not in the vocabulary.
    """

    def __init__(
        self,
        inputs: Inputs,
        keep: Keep,
        targets: torch.Tensor | None = None,
        vocab_size: int = 0,
        everywhere: bool = False,
    ) -> None:
        self.inputs, self.targets, self.everywhere, self.num_targets = inputs, targets, everywhere, 0
        self._columns: slice | torch.Tensor | None = None  # to compute, of every row; else `_computed` [B, T]
        self._kept_columns: slice | torch.Tensor | None = None  # of logits, in their order; else those of `_kept`
        self._kept: torch.Tensor | None = None  # [B, T] where there are logits
        self._parts: list[torch.Tensor] = []  # hidden states for logits
        self._places: list[torch.Tensor] = []  # of the parts: among `_kept_columns`, or in the flat grid
        is_dense, is_mask = inputs.batch.cu_seqlens is None, isinstance(keep, torch.Tensor) and keep.dim() == 2
        device = inputs.batch.positions.device
        if targets is None and is_dense and not is_mask:
            self._columns = self._kept_columns = wanted_columns(keep, inputs.columns, device)
            return
        if targets is not None:
            self._counted = targets != IGNORE_INDEX
            if keep is NOTHING and is_dense and inputs.columns > 1:
                self._columns = _columns_of_targets(targets, self._counted, vocab_size)
            elif targets.device.type != "cpu":
                check_range(targets, vocab_size)
            if keep is NOTHING:
                self._computed = self._counted
                return
            self.targets, self._counted = targets.to(device), self._counted.to(device)
        if is_mask:
            assert isinstance(keep, torch.Tensor)
            self._kept = _check_mask(keep.to(device, torch.bool), inputs)
        else:
            self._kept_columns = wanted_columns(keep, inputs.columns, device)
            self._kept = torch.zeros(inputs.shape, dtype=torch.bool, device=device)
            self._kept[:, self._kept_columns] = True
            if inputs.real is not None:
                self._kept &= inputs.real
        self._computed = self._kept if targets is None else self._kept | self._counted

    # -- for the model --------------------------------------------------------------------------------------------

    @property
    def selection(self) -> Selection:
        """The positions to compute: [B, P] where they are columns, else packed [1, P]."""
        if self.everywhere:
            return Selection(self.inputs.batch, columns=slice(None))
        if self._columns is not None:
            return self.inputs.batch.columns(self._columns)
        return self.inputs.select(self._computed)

    def within(self, columns: slice, hidden: torch.Tensor) -> torch.Tensor:
        """The wanted ones of hidden states [B, t, d] at all positions of some columns."""
        if isinstance(self._columns, slice):
            first, stop, _ = self._columns.indices(self.inputs.columns)
            return hidden[:, max(first - columns.start, 0) : max(stop - columns.start, 0)]
        if self._columns is not None:
            return hidden[:, self._columns[self._among(columns)] - columns.start]
        flat = self._computed[:, columns].flatten().nonzero().squeeze(1)
        return hidden.flatten(0, 1)[flat.to(hidden.device, non_blocking=True)][None]

    # -- what was found -------------------------------------------------------------------------------------------

    def learned(self, columns: slice, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the wanted positions' hidden states in some columns, those with a target [M, d], and the targets [M]."""
        assert self.targets is not None
        rows, targets = hidden.flatten(0, 1), self.targets[:, columns]
        if self._columns is not None:
            targets = self.within(slice(columns.start, columns.stop), targets).flatten()
        else:
            counted = self._counted[:, columns]
            targets = targets[counted]
            if self._computed is not self._counted:
                rows = rows[counted[self._computed[:, columns]]]
        self.num_targets += len(targets)
        return rows, targets.to(rows.device, non_blocking=True)

    def keep(self, columns: slice, hidden: torch.Tensor) -> None:
        """Take the wanted positions' hidden states in some columns, [B, p, d] or packed [1, p, d], for logits."""
        is_part = columns.stop - columns.start < self.inputs.columns
        if self._kept is None:
            if self._kept_columns is not None:
                self._parts.append(hidden)
                if is_part and not isinstance(self._kept_columns, slice):
                    self._places.append(self._among(columns))
            return
        kept = self._kept[:, columns]
        self._parts.append(hidden[0] if self._computed is self._kept else hidden[0, kept[self._computed[:, columns]]])
        if is_part:
            row, column = kept.nonzero(as_tuple=True)
            self._places.append(row * self.inputs.columns + column + columns.start)

    def hidden(self) -> torch.Tensor | None:
        """For logits: [B, P, d] with zeros at padding, [number of True, d] for a mask, None for nothing."""
        if not self._parts:
            return None
        dim = 1 if self._kept is None else 0
        found = torch.cat(self._parts, dim) if len(self._parts) > 1 else self._parts[0]
        if len(self._places) > 1:
            found = found.index_select(dim, torch.cat(self._places).argsort())
        columns, kept = self._kept_columns, self._kept
        if kept is None or columns is None:
            return found
        there = kept[:, columns]
        if not isinstance(columns, slice):
            order = (kept.flatten().cumsum(0).view_as(kept) - 1)[:, columns]
            found = found[order[there]]
        elif self.inputs.real is None:
            return found.view(*there.shape, -1)
        return found.new_zeros(*there.shape, found.shape[-1]).index_put((there,), found)

    def _among(self, columns: slice) -> torch.Tensor:
        """Which of the wanted columns, a vector of indices, are in these."""
        index = self._kept_columns
        assert isinstance(index, torch.Tensor)
        return ((index >= columns.start) & (index < columns.stop)).nonzero().squeeze(1)


def _columns_of_targets(targets: torch.Tensor, counted: torch.Tensor, vocab_size: int) -> slice | None:
    """The columns of targets [B, T] in plain training, where all but perhaps the last are full; None otherwise.

    Targets on a GPU are waited for once, with the check of their range.
    """
    wrong = outside(targets, vocab_size).any()
    body, last, any_last, is_wrong = torch.stack(
        (counted[:, :-1].all(), counted[:, -1].all(), counted[:, -1].any(), wrong)
    ).tolist()
    if is_wrong:
        check_range(targets, vocab_size)
    return slice(0, targets.shape[1] - (not last)) if body and last == any_last else None


def wanted_columns(keep: Keep, T: int, device: torch.device) -> slice | torch.Tensor:
    """`logits_to_keep` as columns: None or 0 all, n the last n, a vector of indices those (negative: from the end)."""
    if keep is None:
        return slice(0, T)
    if not isinstance(keep, torch.Tensor):
        if keep < 0:
            raise ValueError(f"logits_to_keep must be 0 (all), a count, or an index tensor, got {keep}.")
        return slice(max(0, T - keep), T) if keep else slice(0, T)
    if keep.dim() == 0:
        return wanted_columns(int(keep), T, device)
    if keep.dim() != 1 or keep.dtype == torch.bool or keep.is_floating_point():
        raise ValueError(
            "logits_to_keep must be an int, a vector of column indices or a [B, T] mask of booleans, got "
            f"{keep.dtype} of shape {list(keep.shape)}."
        )
    index = keep.to(device)
    if index.numel() and (int(index.min()) < -T or int(index.max()) >= T):
        raise ValueError(f"logits_to_keep has indices outside -{T}..{T - 1}: {index.tolist()[:8]}.")
    return index % T


def _check_mask(mask: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """A [B, T] boolean `logits_to_keep`, refused where it asks for padding."""
    if mask.shape != inputs.shape:
        raise ValueError(f"a boolean logits_to_keep must be [B, T] = {list(inputs.shape)}, got {list(mask.shape)}.")
    if inputs.real is not None and bool((mask & ~inputs.real).any()):
        raise ValueError("logits_to_keep asks for positions that attention_mask says are padding.")
    return mask
