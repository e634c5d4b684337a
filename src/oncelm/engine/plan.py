"""How memory is divided before any of it is taken: weights, activations, slots of states, pages of keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psutil
import torch

from oncelm.engine.pool import Pool
from oncelm.models.yoco.execution import activation_bytes, free_memory
from oncelm.utils.device import resolve_kv_dtype
from oncelm.utils.units import size

MOST_ON_CPU = 4 * 2**30  # bytes of caches, unless told otherwise: what a laptop can spare
RESERVE = 2**30  # bytes of a GPU for CUDA graphs, kernels' buffers and what the allocator cannot join
SNAPSHOT_SHARE = 0.1  # of the caches' memory, for states that are kept (their keys and values take pages as others do)
SNAPSHOTS_A_PLACE = 4  # kept states for each request that can run, at most


@dataclass(frozen=True)
class MemoryPlan:
    """What is taken of a device's memory, in bytes, and what that holds.

    Attributes:
        page_size: tokens of a page.
        num_pages, num_slots: the scratch page 0 and slot 0 included.
        num_snapshots: slots that are not needed for requests that run.
        max_model_len: tokens of the longest request.
        budget: for slots and pages together.
    """

    page_size: int
    num_pages: int
    num_slots: int
    num_snapshots: int
    max_model_len: int
    page_bytes: int
    slot_bytes: int
    weight_bytes: int
    activation_bytes: int
    budget: int

    @property
    def num_tokens(self) -> int:
        """That all pages together hold."""
        return (self.num_pages - 1) * self.page_size

    @property
    def pages_a_request(self) -> int:
        """Of the longest request."""
        return -(-self.max_model_len // self.page_size)

    def table(self) -> str:
        """In words, for whoever starts an engine."""
        running, kept = self.num_slots - 1 - self.num_snapshots, self.num_snapshots
        held = (self.num_pages - 1) // self.pages_a_request
        rows = [
            ("weights", size(self.weight_bytes), ""),
            ("activations", size(self.activation_bytes), "set aside"),
            ("states", size(self.num_slots * self.slot_bytes), f"{running} requests at once, {kept} kept for later"),
            ("shared K/V", size(self.num_pages * self.page_bytes), f"{self.num_tokens:,} tokens"),
        ]
        lines = [f"{name:<12} {amount:>10}  {what}".rstrip() for name, amount, what in rows]
        holds = f"room for {held:,} sequence{'' if held == 1 else 's'} of {self.max_model_len:,} tokens"
        return "\n".join([*lines, f"{'':<12} {'':>10}  {holds}"])


def plan_memory(
    model: Any,
    *,
    max_model_len: int | None,
    max_num_seqs: int,
    page_size: int,
    kv_cache_dtype: str = "auto",
    gpu_memory_utilization: float = 0.9,
    kv_cache_bytes: int | None = None,
    max_num_batched_tokens: int,
    num_snapshots: int | None = None,
) -> MemoryPlan:
    """How many pages and slots there are for a model that is on its device already.

    Args:
        max_model_len: tokens of the longest request; None: `max_position_embeddings`, or less if memory is short.
        num_snapshots: None: as many as a tenth of the caches' memory holds.

    Raises:
        ValueError: too little memory for one request of `max_model_len` tokens, with what would fit.
    """
    config, on_gpu = model.config, model.device.type == "cuda"
    kv_dtype = resolve_kv_dtype(kv_cache_dtype)
    page_bytes = Pool.page_bytes(config, page_size, model.dtype, kv_dtype)
    slot_bytes = Pool.slot_bytes(config, model.dtype, kv_dtype)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    activations = max_num_batched_tokens * activation_bytes(config, model.dtype.itemsize)
    activations += 3 * 4 * max_num_seqs * config.vocab_size  # logits in float32, and two copies to sample from
    if kv_cache_bytes is not None:
        budget, source = kv_cache_bytes, "kv_cache_bytes"
    elif on_gpu:
        total = torch.cuda.get_device_properties(model.device).total_memory
        used = total - free_memory(model.device)
        budget = int(total * gpu_memory_utilization) - used - activations - RESERVE
        source = f"gpu_memory_utilization={gpu_memory_utilization:g}"
    else:
        budget = min(psutil.virtual_memory().available // 2, MOST_ON_CPU)
        source = "the free memory of this machine"

    longest = max_model_len or config.max_position_embeddings
    slots = (1 + max_num_seqs) * slot_bytes
    if num_snapshots is None:
        share = int(max(0, budget - slots) * SNAPSHOT_SHARE)
        num_snapshots = min(share // max(1, slot_bytes), SNAPSHOTS_A_PLACE * max_num_seqs)
    slots += num_snapshots * slot_bytes
    pages_a_request = -(-longest // page_size)
    # more than these nobody could use: each request, running or kept, at its longest
    most = 1 + (max_num_seqs + num_snapshots) * pages_a_request
    num_pages = min(most, max(0, budget - slots) // page_bytes) if page_bytes else most
    fitting = max(0, num_pages - 1) * page_size
    if max_model_len is None:
        longest = min(longest, fitting)
    if longest > fitting or not longest:
        raise ValueError(
            f"{source} leaves {size(max(0, budget))} for caches: {size(slots)} for the states of {max_num_seqs} "
            f"requests and {num_snapshots} snapshots, and pages for {fitting:,} tokens, which is too little for a "
            f"request of max_model_len={longest or config.max_position_embeddings:,}. It takes less with a smaller "
            "max_model_len, max_num_seqs or num_snapshots, or with kv_cache_dtype='int8'."
        )
    return MemoryPlan(
        page_size=page_size,
        num_pages=num_pages,
        num_slots=1 + max_num_seqs + num_snapshots,
        num_snapshots=num_snapshots,
        max_model_len=longest,
        page_bytes=page_bytes,
        slot_bytes=slot_bytes,
        weight_bytes=weights,
        activation_bytes=activations,
        budget=budget,
    )
