"""Chunk parallelism (YOCO, arXiv 2405.05254): every rank holds one contiguous chunk of each sequence.

The model stays as it is; only what it is given as the past (`oncelm.cache.yoco.interface`) reaches over to other ranks:

    gated retention   the state before the chunk                  a state from each rank, once a layer
    sliding window    the last W - 1 keys and values before it    from the rank before (more, if chunks are short)
    shared K/V        all of them                                 gathered once a forward pass

The cross-decoder's queries are the chunk's own, at their places in the whole sequence; nothing else is exchanged.

`chunk_inputs` cuts a batch into chunks of one length. It is made for one forward pass; its batch says, as always,
how many tokens of each sequence came before (`Batch.starts`): r T on rank r for whole rows; for packed rows, 0 but for
a sequence that began on an earlier rank, the first of the chunk.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from oncelm.cache.batch import Batch, Group
from oncelm.cache.yoco.shared_kv import attend_by_group
from oncelm.models.inputs import IGNORE_INDEX
from oncelm.models.yoco import YocoConfig
from oncelm.ops import gated_retention, window_attention
from oncelm.train.parallel.communication import all_chunks, previous_tokens, state_before


class ChunkRetention:
    """Gated retention from the state that the chunks before leave."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def retain(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, batch: Batch) -> Tensor:
        """Outputs [B, T, H, V]."""
        last = list(batch.groups())[-1]
        update, decay = _state_from_zero(*(x[last.where] for x in (k, v, g)))
        if batch.cu_seqlens is not None and (batch.num_sequences > 1 or not batch.starts[0]):
            decay = decay * 0.0  # the last sequence began here: nothing from before it goes on
        start = state_before(update, decay, self.group)
        if batch.cu_seqlens is not None:  # only the first sequence may have begun earlier
            first = start if batch.starts[0] else start * 0.0
            start = torch.cat((first, start.new_zeros(batch.num_sequences - 1, *start.shape[1:])))
        return gated_retention(q, k, v, g, initial_state=start, cu_seqlens=batch.cu_seqlens)[0]


def _state_from_zero(k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The state [N, H, K, V] that gated retention, started from zero, ends with, and its decay [N, H] of one before.

    One matrix product instead of a pass over the chunk: no outputs are needed. float32 or wider.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    # what a state loses from token t to the chunk's end, summed from the end: as a difference of two sums from the
    # beginning, both large in a long chunk, the few tokens that still count would lose most of their digits
    lost = g.to(wide).flip(1).cumsum(1).flip(1)  # over t, t + 1, ...
    weights = F.pad(lost[:, 1:], (0, 0, 0, 1)).exp() * k.shape[-1] ** -0.5
    with torch.autocast(k.device.type, enabled=False):
        update = torch.einsum("bthk,bthv->bhkv", k.to(wide) * weights[..., None], v.to(wide))
    return update, lost[:, 0].exp()


class ChunkWindow:
    """Sliding-window attention whose first queries see the end of the chunk before."""

    def __init__(self, window_size: int, group: ProcessGroup) -> None:
        self.window_size, self.group = window_size, group

    def attend(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Outputs [B, T, H, D]."""
        heads = k.shape[2]
        past = previous_tokens(torch.cat((k, v), dim=2), self.window_size - 1, self.group)
        outputs = []
        for group in batch.groups():
            # a slice even where it is empty: the gradient must pass through the exchange on every rank
            seen = past[group.where[0], past.shape[1] - min(group.start, past.shape[1]) :]
            keys = torch.cat((seen[:, :, :heads], k[group.where]), dim=1)
            values = torch.cat((seen[:, :, heads:], v[group.where]), dim=1)
            outputs.append(window_attention(q[group.where], keys, values, window_size=self.window_size))
        return batch.join(outputs)


class ChunkShared:
    """The shared keys and values of all chunks, gathered when they are appended."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def append(self, k: Tensor, v: Tensor, batch: Batch) -> None:
        """Take in k, v [B, T, H_kv, D] of this chunk and, from the other ranks, of all others."""
        heads, T = k.shape[2], k.shape[1]
        everything = all_chunks(torch.cat((k, v), dim=2), 1, self.group)
        self.k, self.v = everything[:, :, :heads], everything[:, :, heads:]
        self.places: list[slice] = []  # of packed sequences: where each one's keys stand, as far as its last query's
        if batch.cu_seqlens is not None:
            before = self.group.rank() * T
            for group in batch.groups():
                first = before + group.where[1].start
                self.places.append(slice(first - group.start, first + group.length))

    def attend(self, q: Tensor, batch: Batch) -> Tensor:
        """Outputs [B, P, H, D] of queries at the batch's positions."""
        if q.shape[1] == 0:  # no target in this chunk; its part in the gather's backward remains
            return q + 0.0 * (self.k[:, :0] + self.v[:, :0]).sum()

        def keys_and_values(group: Group) -> tuple[Tensor, Tensor]:
            where = (slice(0, 1), self.places[group.rows.start]) if self.places else group.rows
            return self.k[where], self.v[where]

        return attend_by_group(q, batch, keys_and_values)


class ChunkPast:
    """The past of one forward pass of a YOCO model over this rank's chunk.

    Args:
        config: the model's.
        group: the ranks that share each sequence, in the order of their chunks.
        lengths: tokens before this chunk, of each sequence.
    """

    def __init__(self, config: YocoConfig, group: ProcessGroup, lengths: tuple[int, ...]) -> None:
        self.lengths = lengths
        retention = config.self_decoder == "gated_retention"
        self.layers: list[ChunkRetention | ChunkWindow] = [
            ChunkRetention(group) if retention else ChunkWindow(config.window_size, group)
            for _ in range(config.num_self_decoder_layers)
        ]
        self.shared = ChunkShared(group)


def chunk_inputs(
    config: YocoConfig, group: ProcessGroup, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None
) -> dict[str, Any]:
    """What this rank passes to a YOCO model to compute its chunk of a batch; the ranks' losses add up to the batch's.

    A chunk's last token predicts the first of the next. Rows that do not divide among the ranks are padded at the end,
    where no other token sees it and nothing is predicted.

    Args:
        config: the model's.
        group: the ranks that share the batch, in the order of their chunks.
        tokens, labels: [B, T], the same on all ranks of the group; labels as in Hugging Face.
        cu_seqlens: [N + 1] borders of sequences packed into one row.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    total = tokens.shape[1]
    length = -(-total // group.size())
    padding = length * group.size() - total
    begin, end = group.rank() * length, (group.rank() + 1) * length
    inputs: dict[str, Any] = {}
    starts = (begin,) * len(tokens)
    if cu_seqlens is not None:
        targets[0, cu_seqlens[1:].long() - 1] = IGNORE_INDEX
        borders = [*cu_seqlens.tolist(), *([total + padding] if padding else [])]
        inside = [(first, last) for first, last in pairwise(borders) if first < end and last > begin and first < last]
        starts = tuple(max(0, begin - first) for first, _ in inside)
        cuts = [0, *(min(last, end) - begin for _, last in inside)]
        inputs["cu_seqlens"] = torch.tensor(cuts, dtype=torch.int32, device=tokens.device)
    return inputs | {
        "input_ids": F.pad(tokens, (0, padding))[:, begin:end],
        "targets": F.pad(targets, (0, padding), value=IGNORE_INDEX)[:, begin:end],
        "past": ChunkPast(config, group, starts),
    }
