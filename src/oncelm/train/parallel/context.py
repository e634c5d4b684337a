"""Context parallelism (YOCO, arXiv 2405.05254: chunk parallelism): every rank has one chunk of each sequence.

The model is unchanged; it is given a past that exchanges data with other ranks (`Family.context_past`). Each mixer
defines what its layers exchange (`Mixer.chunk_past`): a state from each rank, or the last keys and values of the rank
before. The shared keys and values are gathered once a forward pass. The cross-decoder's queries are
the chunk's own, at their places in the whole sequence; nothing else is exchanged.

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
from transformers import PreTrainedConfig

from oncelm.models.inputs import IGNORE_INDEX
from oncelm.models.registry import family


def chunk_inputs(
    config: PreTrainedConfig, group: ProcessGroup, tokens: Tensor, labels: Tensor, cu_seqlens: Tensor | None = None
) -> dict[str, Any]:
    """What this rank passes to a model to compute its chunk of a batch; the ranks' losses add up to the batch's.

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
        "past": family(config).context_past(config)(group, starts),
    }
