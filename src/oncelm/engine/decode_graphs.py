"""Decode passes of a few tokens a request as CUDA graphs: the host writes a few numbers and starts one of them.

There is a graph for some numbers of rows; other batches are filled up with rows that write to slot 0 and page 0. What
changes from step to step, tokens and positions, is copied at once. The pages of a request stand in a line of a table on
the GPU, that of its slot, and are sent when they have changed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch

from oncelm.cache import Batch, SharedKV
from oncelm.cache.yoco.places import Places
from oncelm.engine.piece_graphs import PieceGraphs, pieces_in_graphs
from oncelm.engine.pool import Pool
from oncelm.engine.work import UNREAD, Piece, Row
from oncelm.models import YocoForCausalLM
from oncelm.models.plain import Wiring
from oncelm.models.step_graph import record
from oncelm.models.yoco.decoding import plain_modules
from oncelm.ops.attention import has_decode_kernel
from oncelm.utils.device import to_device

WIDTHS = {8: 64, 16: 32}  # tokens of rows with drafts -> rows of a pass: the logits of all these tokens take memory


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


class PageTables:
    """Which pages the requests have, on the device: lines [num_slots, max_pages + 1], each that of a slot.

    Behind a request's pages is scratch, and so is the last column.
    """

    def __init__(self, pool: Pool, max_pages: int) -> None:
        self.lines = torch.zeros(pool.num_slots, max_pages + 1, dtype=torch.int32, device=pool.device)
        self._sent: dict[int, tuple[Sequence[int], int]] = {}  # of a slot: whose first how many pages are in its line

    def send(self, rows: Sequence[Row | Piece]) -> None:
        """Bring the lines of these rows up to date.

        As long as a request has a slot its list of pages only grows, and the next one there has another list.
        """
        for row in rows:
            pages, count = row.pages, len(row.pages)
            known, sent = self._sent.get(row.slot, ((), 0))
            if known is pages:
                if sent == count:
                    continue
                entries = pages[sent:]
            else:
                sent, entries = 0, [*pages, *[0] * (sent - count)]
            line = self.lines[row.slot, sent : sent + len(entries)]
            line.copy_(to_device(torch.tensor(entries, dtype=torch.int32), self.lines.device))
            self._sent[row.slot] = pages, count


class DecodeGraphs:
    """Logits of rows of a few tokens. On another device than a GPU the same passes run without graphs.

    Args:
        most: rows of a step.
        max_pages: pages of a row.
        last_tokens: [num_slots], what `UNREAD` stands for.

    Attributes:
        widths: for rows of 1 token, of up to 8 and of up to 16, as far as attention has a kernel for as many.
        pieces: of passes over prompts; None where such a pass cannot be a graph.
    """

    def __init__(
        self, model: YocoForCausalLM, pool: Pool, most: int, max_pages: int, last_tokens: torch.Tensor
    ) -> None:
        self.model = model
        tables = PageTables(pool, max_pages)
        self.widths = {
            width: GraphsOfWidth(model, pool, tables, last_tokens, min(most, rows), width)
            for width, rows in {1: most, **WIDTHS}.items()
            if _has_kernels(model, pool, width)
        }
        self.pieces = PieceGraphs(model, pool, tables) if pieces_in_graphs(model) else None
        self._wiring: Wiring | None = None
        self._quantization_changes = -1

    def stand_for_model(self) -> bool:
        """Whether graphs may compute what the model computes now: it has no adapters, hooks or mixers that wait.

        Where it has other modules or weights than before, all graphs are forgotten.
        """
        model = self.model
        if not model.use_cuda_graphs:
            return False
        unchanged = self._wiring is not None and self._wiring.is_unchanged
        if not unchanged or self._quantization_changes != model.quantization_changes:
            self._wiring = Wiring(model, plain_modules(model.config))
            self._quantization_changes = model.quantization_changes
            for graphs in self.widths.values():
                graphs.forget()
            if self.pieces is not None:
                self.pieces.forget()
        assert self._wiring is not None
        return self._wiring.is_plain


class GraphsOfWidth:
    """Those of rows of up to `width` tokens; shorter ones are filled up with drafts."""

    def __init__(
        self,
        model: YocoForCausalLM,
        pool: Pool,
        tables: PageTables,
        last_tokens: torch.Tensor,
        most: int,
        width: int,
    ) -> None:
        self.model, self.pool, self.tables, self.last_tokens = model, pool, tables, last_tokens
        self.most, self.width = most, width
        # with drafts powers of two are enough: there is room for more tokens anyway
        self.sizes = [size for size in batch_sizes(most) if width == 1 or size == most or not size & (size - 1)]
        on_gpu = pool.device.type == "cuda"
        # slots, starts, how many tokens count, tokens: [3 + width, most], where graphs and where the host have them
        self.inputs = torch.zeros(3 + width, most, dtype=torch.long, device=pool.device)
        self._staged = torch.zeros(self.inputs.shape, dtype=torch.long, pin_memory=on_gpu)
        self._host = self._staged.numpy()
        self._copied = torch.cuda.Event() if on_gpu else None  # what was staged last may be written over
        self.forget()

    def forget(self) -> None:
        """Drop all graphs."""
        self.graphs: dict[int, tuple[Any, torch.Tensor]] = {}  # of a number of rows: the graph, and its logits
        self._memory = None if self._copied is None else torch.cuda.graph_pool_handle()  # that all of them share

    def __call__(self, rows: Sequence[Row]) -> torch.Tensor:
        """Logits [sum of num_logits, V]. Nothing here waits for the step."""
        count, host = len(rows), self._host
        if count > self.most:
            return torch.cat([self(rows[n : n + self.most]) for n in range(0, count, self.most)])
        size = self.sizes[bisect_left(self.sizes, count)]
        if size not in self.graphs:
            self.record(size)
        if self._copied is not None:
            self._copied.synchronize()
        host[0, :count] = [row.slot for row in rows]
        host[1, :count] = [row.start for row in rows]
        if self.width == 1:
            host[3, :count] = [row.tokens[0] for row in rows]
        else:
            host[2, :count] = [row.kept for row in rows]
            for n, row in enumerate(rows):
                host[3 : 3 + len(row.tokens), n] = row.tokens
        host[:, count:size] = 0
        self.inputs.copy_(self._staged, non_blocking=True)
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self.pool.device))
        self.tables.send(rows)
        graph, logits = self.graphs[size]
        graph.replay()
        if self.width == 1:
            return logits[:count, 0].clone()
        places = [n * self.width + t for n, row in enumerate(rows) for t in range(row.kept - 1, len(row.tokens))]
        return logits.flatten(0, 1)[to_device(torch.tensor(places), logits.device)]

    @torch.no_grad()
    def record(self, size: int) -> None:
        """Make the graph of `size` rows. A pass over scratch comes first, so that kernels are there when it is made."""
        self.inputs.zero_()
        self._step(size)
        self.graphs[size] = record(lambda: self._step(size), self.pool.device, self._memory)

    def _step(self, size: int) -> torch.Tensor:
        """Logits [size, width, V]."""
        inputs = self.inputs[:, :size]
        slots, starts, kept, tokens = inputs[0], inputs[1], inputs[2], inputs[3:].t().contiguous()
        if self.width == 1:
            tokens = torch.where(tokens == UNREAD, self.last_tokens[slots, None], tokens)
        positions = starts[:, None] + torch.arange(self.width, device=tokens.device)
        places = Places(slots, self.tables.lines[slots], kept if self.width > 1 else None)
        return self.model.next_logits(tokens, Batch.step(positions), self.pool.pasts(places))


def _has_kernels(model: YocoForCausalLM, pool: Pool, width: int) -> bool:
    """Whether a kernel reads pages for rows of `width` tokens; PyTorch would pass over all that there could be."""
    heads, config = {"shared": model.config.num_attention_heads}, model.config
    return pool.device.type == "cpu" or all(
        has_decode_kernel(
            store.k.new_empty(1, width, heads.get(name, config.num_self_heads), store.k.shape[3], dtype=model.dtype),
            store.k,
        )
        for name, store in pool.stores.items()
        if isinstance(store, SharedKV)
    )
