"""The loss computed through a model's head, which tools may have replaced or wrapped."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from oncelm.models.plain import is_plain_linear
from oncelm.ops import linear_cross_entropy, vocab_parallel_cross_entropy

LOGITS_AT_ONCE = 2**26  # of a head that is called, not fused: 256 MB in float32


def head_loss(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Summed cross-entropy of the logits `head(hidden)` of hidden [M, d] against targets [M], never all in memory.

    A plain linear head is computed by the fused op from its weight, and one whose weight is split over ranks by its
    own op. Any other (with an adapter, in 4 bits, offloaded, with hooks) is called, a block of rows at a time.
    """
    weight = getattr(head, "weight", None)
    if isinstance(weight, DTensor):
        return vocab_parallel_cross_entropy(hidden, weight, targets)
    if isinstance(head, nn.Linear) and is_plain_linear(head):
        return linear_cross_entropy(hidden, head.weight, targets)

    def block_loss(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = head(rows)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), wanted, reduction="sum")

    width = getattr(head, "out_features", None) or 2**17
    size = max(1, LOGITS_AT_ONCE // width)
    total = hidden[:0].to(torch.promote_types(hidden.dtype, torch.float32)).sum()  # 0, with a gradient of 0
    for start in range(0, len(hidden), size):
        rows, wanted = hidden[start : start + size], targets[start : start + size]
        # with one block, its logits may as well be kept for the backward pass
        run = partial(checkpoint, block_loss, use_reentrant=False) if len(hidden) > size else block_loss
        total = total + run(rows, wanted)
    return total
