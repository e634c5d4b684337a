"""Short passes over prompts as CUDA graphs: a piece beside decode steps, or a question behind a long document.

Launching a pass kernel by kernel takes Python some 20 ms, however few tokens it has; a graph, less than one. There are
graphs for some numbers of tokens. A pass of fewer is filled up with tokens of one more sequence, which lives in slot 0
and page 0; only the device knows where sequences begin.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from oncelm.cache import Batch
from oncelm.cache.yoco.places import Places
from oncelm.engine.pool import Pool
from oncelm.engine.work import Piece
from oncelm.models import YocoForCausalLM
from oncelm.models.step_graph import record
from oncelm.models.yoco.mixers.registry import kinds_of
from oncelm.models.yoco.model import run_layers
from oncelm.utils.device import to_device

if TYPE_CHECKING:
    from oncelm.engine.decode_graphs import PageTables

TOKENS = (64, 128, 256, 512, 768, 1024, 1536, 2048)  # larger passes keep a GPU busy while they are launched
MOST_PIECES = 7  # of a pass, beside the sequence that fills it up


def pieces_in_graphs(model: YocoForCausalLM) -> bool:
    """Whether a pass over prompts can be a graph: nothing in it asks the host where sequences begin."""
    config = model.config
    return config.layout != "interleaved" and all(mixer.packs_in_cuda_graphs for mixer in kinds_of(config))


class PieceGraphs:
    """Passes of up to MOST_PIECES pieces and TOKENS[-1] tokens, through the self-decoder alone. On another device than
    a GPU they run without graphs."""

    def __init__(self, model: YocoForCausalLM, pool: Pool, tables: PageTables) -> None:
        self.model, self.pool, self.tables = model, pool, tables
        # tokens, positions (of as many as a pass has), slots [N], borders [N + 1]: where graphs read them
        self.inputs = torch.zeros(2 * TOKENS[-1] + 2 * MOST_PIECES + 3, dtype=torch.long, device=pool.device)
        self.forget()

    def forget(self) -> None:
        """Drop all graphs."""
        self.graphs: dict[int, tuple[Any, None]] = {}  # by tokens
        self._memory = torch.cuda.graph_pool_handle() if self.pool.device.type == "cuda" else None  # which they share

    def sizes(self, most: int) -> list[int]:
        """The numbers of tokens that have a graph, for passes of up to `most` tokens."""
        return [size for n, size in enumerate(TOKENS) if n == 0 or TOKENS[n - 1] < most]

    def take(self, pieces: Sequence[Piece]) -> bool:
        """Read the pieces, if a graph can: nothing is wanted of them, and they are short and few enough."""
        total = sum(len(piece.tokens) for piece in pieces)
        if total > TOKENS[-1] or len(pieces) > MOST_PIECES or any(piece.wanted for piece in pieces):
            return False
        size = TOKENS[bisect_left(TOKENS, total)]
        if size not in self.graphs:
            self.record(size)
        N, host = MOST_PIECES + 1, np.zeros(2 * size + 2 * MOST_PIECES + 3, np.int64)
        borders = [*accumulate((len(piece.tokens) for piece in pieces), initial=0)]
        for n, piece in enumerate(pieces):
            start, stop = borders[n], borders[n + 1]
            host[start:stop] = piece.tokens
            host[size + start : size + stop] = np.arange(piece.start, piece.start + len(piece.tokens))
            host[2 * size + n] = piece.slot
        host[2 * size + N :] = borders + [total] * (N - len(borders)) + [size]
        self.inputs[: len(host)].copy_(to_device(torch.from_numpy(host), self.pool.device))
        self.tables.send(pieces)
        self.graphs[size][0].replay()
        return True

    @torch.no_grad()
    def record(self, size: int) -> None:
        """Make the graph of `size` tokens. A pass over scratch comes first, which compiles the kernels."""
        self.inputs.zero_()
        self.inputs[2 * size + 2 * MOST_PIECES + 2] = size  # all of them fill the pass up
        self._run(size)
        self.graphs[size] = record(lambda: self._run(size), self.pool.device, self._memory)

    def _run(self, size: int) -> None:
        N, model = MOST_PIECES + 1, self.model
        tokens, positions, slots, borders = self.inputs[: 2 * size + 2 * N + 1].split((size, size, N, N + 1))
        batch = Batch((), (), (), positions[None], borders.to(torch.int32))
        past = self.pool.pasts(Places(slots, self.tables.lines[slots]))
        embeddings = model.embed(tokens[None])
        run_layers(
            model.config, model.self_decoder, model.cross_decoder, embeddings, batch, past, None, model.token_parts
        )
