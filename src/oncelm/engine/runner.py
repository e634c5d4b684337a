"""Runs the forward passes of a step: pieces of prompts, and rows that give logits (work.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate

import numpy as np
import torch

from oncelm.cache import Batch, Selection
from oncelm.cache.yoco.places import Places
from oncelm.engine.decode_graphs import DecodeGraphs
from oncelm.engine.pool import Pool
from oncelm.engine.work import UNREAD, Piece, Row
from oncelm.models import YocoForCausalLM
from oncelm.models.yoco.model import run_layers
from oncelm.utils.device import send, to_device


class Runner:
    """A model over the slots and pages of a pool.

    Memory that runs out raises torch.OutOfMemoryError (on a CPU RuntimeError); slots and pages of that pass then hold
    anything, those of others are as they were.

    Args:
        max_num_seqs: rows of a decode pass at most.
        max_pages: pages of a request at most.
    """

    def __init__(self, model: YocoForCausalLM, pool: Pool, *, max_num_seqs: int, max_pages: int) -> None:
        self.model, self.pool = model, pool
        self.max_num_seqs, self.max_pages = max_num_seqs, max_pages
        self.last_tokens = torch.zeros(pool.num_slots, dtype=torch.long, device=pool.device)  # by slot; see `keep`
        self.graphs: DecodeGraphs | None = None
        if pool.device.type == "cuda":
            self.graphs = DecodeGraphs(model, pool, max_num_seqs, max_pages, self.last_tokens)

    @torch.no_grad()
    def warm_up(
        self, prefill_tokens: int = 0, drafts: bool = False, progress: Callable[[int, int], object] | None = None
    ) -> None:
        """Compile kernels and record graphs ahead, over scratch; on a CPU there is nothing to do.

        Args:
            prefill_tokens: of the largest pass; 0: leave prefill out.
            drafts: for rows with drafts too.
            progress: called with how many of how many passes are done.
        """
        if self.graphs is None:
            return
        passes: list[Callable[[], object]] = []
        for width, graphs in self.graphs.widths.items() if self.graphs.stand_for_model() else ():
            if width == 1 or drafts:
                # the largest first: the others fit in its memory
                passes += [partial(graphs.record, size) for size in reversed(graphs.sizes)]
        if prefill_tokens and (pieces := self.graphs.pieces) is not None and self.graphs.stand_for_model():
            passes += [partial(pieces.record, size) for size in reversed(pieces.sizes(prefill_tokens))]
        for count in (1, 2) if prefill_tokens else ():  # a piece alone, and some side by side
            tokens = [0] * min(-(-prefill_tokens // count), self.max_pages * self.pool.page_size)
            passes.append(partial(self.prefill, [Piece(0, [0] * self.max_pages, 0, tokens)] * count))
        for done, run in enumerate(passes):
            run()
            if progress is not None:
                progress(done + 1, len(passes))

    # -- prompts --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(self, pieces: Sequence[Piece]) -> list[torch.Tensor | None]:
        """Read pieces of prompts, through the self-decoder alone unless something is wanted.

        Returns:
            Of each piece the final hidden states [P, d] of its tokens where they are wanted, else None.
        """
        if not pieces:
            return []
        graphs = self.graphs
        if graphs is not None and graphs.pieces is not None and graphs.stand_for_model() and graphs.pieces.take(pieces):
            return [None] * len(pieces)
        counts = [len(piece.tokens) if piece.wanted else 0 for piece in pieces]
        x = self._run(pieces, self._batch(pieces), counts)
        if x is None:
            return [None] * len(pieces)
        hidden = self.model.layer_norm(x).flatten(0, 1).split(counts)
        return [states if piece.wanted else None for piece, states in zip(pieces, hidden, strict=True)]

    @torch.no_grad()
    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [M, V] of final hidden states [M, d]."""
        return self.model.output_projection(hidden)

    @torch.no_grad()
    def keep(self, rows: Sequence[Row], tokens: torch.Tensor) -> None:
        """Let the tokens [N] that were chosen behind N rows be what `UNREAD` means in their slots. Negative ones, which
        stand for none, become token 0: whatever comes of that is thrown away."""
        slots = send([row.slot for row in rows], torch.long, self.pool.device)
        self.last_tokens[slots] = tokens.clamp(min=0)

    # -- decoding -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, rows: Sequence[Row]) -> torch.Tensor:
        """Logits [sum of num_logits, V] of rows, in order; in the model's dtype."""
        passes: dict[Callable[[Sequence[Row]], torch.Tensor], list[int]] = {}  # which rows each one takes
        for n, run in enumerate(self._runs([len(row.tokens) for row in rows])):
            passes.setdefault(run, []).append(n)
        found = [run([rows[n] for n in numbers]) for run, numbers in passes.items()]
        if len(found) == 1:
            return found[0]
        order = _order([row.num_logits for row in rows], [n for numbers in passes.values() for n in numbers])
        return torch.cat(found)[to_device(order, self.pool.device)]

    def _runs(self, lengths: list[int]) -> list[Callable[[Sequence[Row]], torch.Tensor]]:
        """What computes each of the rows of so many tokens: those with drafts together, if a graph is wide enough."""
        if self.graphs is None or not self.graphs.widths or not self.graphs.stand_for_model():
            return [self._decode_single if length == 1 else self._decode_several for length in lengths]
        widths = self.graphs.widths
        longest = max((length for length in lengths if length <= max(widths)), default=1)
        few = next(graphs for width, graphs in widths.items() if longest <= width)
        return [widths[1] if length == 1 else few if length <= longest else self._decode_several for length in lengths]

    def _decode_single(self, rows: Sequence[Row]) -> torch.Tensor:
        """Rows of one token, side by side."""
        batch = Batch.dense(tuple(row.start for row in rows), 1, self.pool.device)
        return self._logits(self._run(rows, batch, [1] * len(rows)))

    def _decode_several(self, rows: Sequence[Row]) -> torch.Tensor:
        """Rows of any number of tokens, packed."""
        batch = Batch.packed(*_spans(rows), self.pool.device)
        has_drafts = any(row.num_logits > 1 for row in rows)
        kept = tuple(row.kept for row in rows) if has_drafts else None
        return self._logits(self._run(rows, batch, [row.num_logits for row in rows], kept))

    def _logits(self, x: torch.Tensor | None) -> torch.Tensor:
        """[M, V] of the last layer's output [B, P, d]."""
        assert x is not None
        model = self.model
        return model.token_parts(x).head(x, model.layer_norm, model.output_projection).flatten(0, 1)

    # -- a forward pass -------------------------------------------------------------------------------------------

    def _batch(self, work: Sequence[Piece]) -> Batch:
        """Packed; a single piece is dense, so that nothing has to tell sequences apart."""
        starts, lengths = _spans(work)
        if len(work) == 1:
            return Batch.dense(starts, lengths[0], self.pool.device)
        return Batch.packed(starts, lengths, self.pool.device)

    def _run(
        self,
        work: Sequence[Piece | Row],
        batch: Batch,
        counts: Sequence[int],
        kept: tuple[int, ...] | None = None,
    ) -> torch.Tensor | None:
        """What the last layer gives, [B, P, d], at the last `counts` tokens of each sequence; None where all are 0."""
        model = self.model
        ids = np.concatenate([np.asarray(one.tokens, np.int64) for one in work])
        tokens = to_device(torch.from_numpy(ids), self.pool.device)
        if (ids == UNREAD).any():
            assert len(ids) == len(work), "tokens that are not read beside drafts"
            slots = send([one.slot for one in work], torch.long, self.pool.device)
            tokens = torch.where(tokens == UNREAD, self.last_tokens[slots], tokens)
        wanted = None
        if tuple(counts) == batch.lengths:
            wanted = Selection(batch, columns=slice(None))
        elif any(counts):
            wanted = _last(batch, counts)
        return run_layers(
            model.config, model.self_decoder, model.cross_decoder,
            model.embed(tokens.view(batch.num_sequences if batch.cu_seqlens is None else 1, -1)),
            batch, self.pool.pasts(self._places(work, kept)), wanted, model.token_parts,
        )  # fmt: skip

    def _places(self, work: Sequence[Piece | Row], kept: tuple[int, ...] | None) -> Places:
        size = self.pool.page_size
        counts = [-(-(one.start + len(one.tokens)) // size) for one in work]
        tables = torch.zeros(len(work), max(counts), dtype=torch.int32)
        for n, (one, count) in enumerate(zip(work, counts, strict=True)):
            tables[n, :count] = torch.tensor(one.pages[:count], dtype=torch.int32)
        slots = torch.tensor([one.slot for one in work])
        return Places(to_device(slots, self.pool.device), to_device(tables, self.pool.device), kept)


def _spans(work: Sequence[Piece | Row]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where each one starts, and how many tokens it has."""
    return tuple(one.start for one in work), tuple(len(one.tokens) for one in work)


def _last(batch: Batch, counts: Sequence[int]) -> Selection:
    """The last `counts` tokens of each sequence of a packed batch."""
    mask = torch.zeros(1, sum(batch.lengths), dtype=torch.bool)
    for end, count in zip(accumulate(batch.lengths), counts, strict=True):
        mask[0, end - count : end] = True
    return batch.pick(mask)


def _order(counts: Sequence[int], given: Sequence[int]) -> torch.Tensor:
    """Which of the logits of rows in the order `given`, `counts[n]` of row n, come first, second, ... in their own."""
    firsts = dict(zip(given, accumulate((counts[n] for n in given), initial=0), strict=False))
    return torch.tensor([firsts[n] + i for n, count in enumerate(counts) for i in range(count)])
