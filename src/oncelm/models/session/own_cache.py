"""A session of one of OnceLM's families, through the family's own cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedModel

from oncelm.models.session.base import READ_AT_ONCE, Session, pad


class CacheSession(Session):
    """A model of one of OnceLM's families.

    Args:
        cache_options: for `new_cache`: names in `Family.cache_options`, and "dtype".
        read_options: for `prefill` and `forward`: names in `Family.read_options`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: int = 1,
        room: int | None = None,
        chunk_size: int | None = None,
        *,
        cache_options: dict[str, Any] | None = None,
        read_options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(model, rows, room, chunk_size)
        self.cache_options, self.read_options = cache_options or {}, read_options or {}
        self.branches = self.model.packs_rows
        whole = self.model.longest_whole(**self.read_options)
        self.longest = None if self.branches else READ_AT_ONCE if whole is None else whole
        self.window = model.config.max_position_embeddings if self.model.reads_by_windows else None

    @property
    def num_tokens(self) -> int:
        return 0 if self.cache is None else self.cache.num_tokens

    @torch.no_grad()
    def read(self, ids: torch.Tensor, progress: Callable[[int], object] | None = None) -> torch.Tensor:
        before = self.num_tokens
        report = None if progress is None else lambda done: progress(before + done)
        chunk = {} if self.chunk_size is None else {"chunk_size": self.chunk_size}
        ids = ids.to(self.model.cache_device)
        return self.model.prefill(ids, self.open(), progress=report, **chunk, **self.read_options)

    @torch.no_grad()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._forward(tokens, logits_to_keep=1)[:, -1]

    @torch.no_grad()
    def score(self, texts: Sequence[torch.Tensor], wanted: torch.Tensor | None = None) -> torch.Tensor:
        if len(texts) == 1 and wanted is None:
            return self._forward(texts[0][None])[0]
        if self.branches:
            borders = torch.tensor([0, *accumulate(map(len, texts))], dtype=torch.int32)
            ids = torch.cat(list(texts))[None]
            kept = torch.ones(ids.shape, dtype=torch.bool) if wanted is None else wanted[None]
            return self._forward(ids, cu_seqlens=borders, logits_to_keep=kept)
        self._check_whole(texts)
        ids, real = pad(texts)
        kept = real if wanted is None else real.masked_scatter(real, wanted)
        ids = ids.to(self.model.cache_device)
        return self.model(ids, use_cache=False, logits_to_keep=kept, **self.read_options).logits

    def select(self, rows: Sequence[int]) -> None:
        self._check_read()
        self.cache.select(rows)
        self.rows = len(rows)

    def mark(self) -> Any:
        return self.model.mark(self.open())

    def rewind(self, mark: Any) -> None:
        self.cache = self.model.rewind(self.cache, mark)

    def reset(self) -> None:
        if self.cache is not None:
            self.cache = self.model.reuse(self.cache)

    def bytes_of(self, tokens: int) -> int:
        return self.model.new_cache(1, tokens, **self.cache_options).nbytes() if self.branches else 0

    def nbytes(self) -> int:
        return 0 if self.cache is None else self.cache.nbytes()

    def open(self) -> Any:
        if self.cache is None:
            self.cache = self.model.new_cache(self.rows, self.room, **self.cache_options)
        return self.cache

    def _forward(self, ids: torch.Tensor, **options: Any) -> torch.Tensor:
        ids = ids.to(self.model.cache_device)
        cache = self.open()
        return self.model(ids, past_key_values=cache, use_cache=True, **options, **self.read_options).logits
