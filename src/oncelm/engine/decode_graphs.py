"""Decode passes of one token a request as CUDA graphs: the host writes a few numbers and starts one of them.

There is a graph for some numbers of rows; other batches are filled up with rows that write to slot 0 and page 0. What
changes from step to step, tokens and positions, is copied at once. The pages of a request stand in a line of a table on
the GPU, that of its slot, and are sent when they have changed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch

from oncelm.cache import Batch
from oncelm.cache.yoco.places import Places
from oncelm.engine.pool import Pool
from oncelm.engine.work import Row
from oncelm.models import YocoForCausalLM
from oncelm.models.plain import Wiring
from oncelm.models.step_graph import record
from oncelm.models.yoco.decoding import plain_modules


def batch_sizes(most: int) -> list[int]:
    """The numbers of rows that have a graph of their own, `most` the last.

    >>> batch_sizes(40)
    [1, 2, 4, 8, 12, 16, 24, 32, 40]
    """
    sizes = [1, 2, 4, 8]
    while sizes[-1] < most:
        step = max(4, 1 << (sizes[-1].bit_length() - 2))  # a quarter to a half more
        sizes.append(sizes[-1] + step)
    return [*(size for size in sizes if size < most), most]


class DecodeGraphs:
    """Logits of rows of one token. On another device than a GPU the same passes run without graphs.

    Args:
        most: rows of a pass.
        max_pages: pages of a request.
    """

    def __init__(self, model: YocoForCausalLM, pool: Pool, most: int, max_pages: int) -> None:
        self.model, self.pool = model, pool
        self.sizes = batch_sizes(most)
        on_gpu, device = pool.device.type == "cuda", pool.device
        # tokens, positions, slots [3, most], where graphs read them and where the host writes them
        self.inputs = torch.zeros(3, most, dtype=torch.long, device=device)
        self.staged = torch.zeros(3, most, dtype=torch.long, pin_memory=on_gpu)
        self.tables = torch.zeros(pool.num_slots, max_pages, dtype=torch.int32, device=device)
        self.staged_tables = torch.zeros(most, max_pages, dtype=torch.int32, pin_memory=on_gpu)
        self._host, self._host_tables = self.staged.numpy(), self.staged_tables.numpy()
        self._sent: dict[int, list[int]] = {}  # the pages that stand in the line of a slot
        self._copied = torch.cuda.Event() if on_gpu else None  # what was staged last may be written over
        self._memory: Any = None  # that all graphs share
        self._graphs: dict[int, tuple[Any, torch.Tensor]] = {}  # of a number of rows: the graph, and its logits
        self._wiring: Wiring | None = None
        self._recorded_of = -1

    def stand_for_model(self) -> bool:
        """Whether graphs may compute what the model computes now: it has no adapters, hooks or mixers that wait.

        Where it has other modules or weights than before, all graphs are forgotten.
        """
        model = self.model
        if not model.use_cuda_graphs:
            return False
        unchanged = self._wiring is not None and self._wiring.is_unchanged
        if not unchanged or self._recorded_of != model.quantization_changes:
            self._wiring = Wiring(model, plain_modules(model.config))
            self._recorded_of = model.quantization_changes
            self._graphs.clear()
            self._memory = torch.cuda.graph_pool_handle() if self.pool.device.type == "cuda" else None
        assert self._wiring is not None
        return self._wiring.is_plain

    def __call__(self, rows: Sequence[Row]) -> torch.Tensor:
        """Logits [N, V] of N rows of one token. Nothing here waits for the step."""
        count = len(rows)
        size = self.sizes[bisect_left(self.sizes, count)]
        if size not in self._graphs:
            self.record(size)
        if self._copied is not None:
            self._copied.synchronize()
        host = self._host
        host[0, :count] = [row.tokens[0] for row in rows]
        host[1, :count] = [row.start for row in rows]
        host[2, :count] = [row.slot for row in rows]
        host[:, count:size] = 0
        self.inputs.copy_(self.staged, non_blocking=True)
        for n, row in enumerate(rows):
            if self._sent.get(row.slot) != row.pages:
                self._send_pages(n, row)
        if self._copied is not None:
            self._copied.record()
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:count].clone()

    def _send_pages(self, n: int, row: Row) -> None:
        """Put a row's pages into the line of its slot. From line n of the staged ones, which nobody else uses now."""
        old, pages = self._sent.pop(row.slot, []), list(row.pages)
        first = len(old) if len(old) < len(pages) and pages[: len(old)] == old else 0
        self._host_tables[n, first : len(pages)] = pages[first:]
        line, staged = self.tables[row.slot], self.staged_tables[n]
        line[first : len(pages)].copy_(staged[first : len(pages)], non_blocking=True)
        self._sent[row.slot] = pages

    @torch.no_grad()
    def record(self, size: int) -> None:
        """Make the graph of `size` rows. A pass over scratch comes first, so that kernels are there when it is made."""
        self.inputs.zero_()
        self._step(size)
        self._graphs[size] = record(lambda: self._step(size), self.pool.device, self._memory)

    def _step(self, size: int) -> torch.Tensor:
        tokens, positions, slots = self.inputs[:, :size]
        past = self.pool.pasts(Places(slots, self.tables[slots]))
        return self.model.next_logits(tokens[:, None], Batch.step(positions[:, None]), past)
