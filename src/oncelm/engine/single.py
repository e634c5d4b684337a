"""Models whose cache has no form for pages and slots: the same engine, one request at a time, over a session.

Only memory and forward passes are others. What a request asks for, its tokens, text, outputs and metrics are the
engine's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from oncelm.engine.engine import Engine
from oncelm.engine.intake import Prompt
from oncelm.engine.options import EngineOptions, Limits
from oncelm.engine.params import SamplingParams, as_params
from oncelm.engine.plan import MemoryPlan
from oncelm.engine.work import UNREAD, Piece, Row
from oncelm.models.registry import family, titles
from oncelm.models.session import open_session
from oncelm.utils.device import resolve_kv_dtype

LONGEST = 2**20  # tokens of a request to a model that has no longest text of its own, unless max_model_len says more
# what needs pages, slots or snapshots
NOT_HERE = (
    *("kv_cache_bytes", "page_size", "num_snapshots", "cpu_cache_bytes", "cache_dir", "disk_cache_bytes"),
    "speculative",
)


class SingleEngine(Engine):
    """The engine of a model that has no form for pages and slots.

    Raises:
        ValueError: an option that needs them.
    """

    def __init__(self, model: Any, tokenizer: Any = None, options: EngineOptions | None = None, **more: Any) -> None:
        given, default = options or EngineOptions(), EngineOptions()
        self._able = family(model.config)
        self._reason = (
            f"{type(model).__name__} runs requests one at a time: only {titles(lambda one: one.runs_in_engine)} models "
            "keep what they read in pages."
        )
        for name in NOT_HERE:
            if getattr(given, name) != getattr(default, name):
                raise ValueError(f"{name}={getattr(given, name)!r} is not for this model. {self._reason}")
        super().__init__(model, tokenizer, replace(given, max_num_seqs=1, enable_prefix_caching=False), **more)

    def add_request(self, request_id: str, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> Any:
        params = as_params(params)
        if params.prompt_logprobs is not None and self._able.reads_by_windows:
            raise ValueError(
                f"prompt_logprobs is not for {self._able.title} models, which read a prompt by windows; got "
                f"{params.prompt_logprobs}."
            )
        return super().add_request(request_id, prompt, params, **options)

    def add_document(self, request_id: str, document: Prompt, **options: Any) -> Any:
        raise ValueError(f"a document cannot be kept: {self._reason}")

    def _plan_memory(self, limits: Limits) -> MemoryPlan:
        """One request, on one page in name only: the session takes the memory that it needs as it goes."""
        config = self.model.config.get_text_config()
        trained = None if self._able.reads_by_windows else getattr(config, "max_position_embeddings", None)
        longest = self.options.max_model_len or trained or LONGEST
        weights = sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))
        if self.options.verbose:
            print(self._reason, file=sys.stderr, flush=True)
        return MemoryPlan(
            page_size=longest, num_pages=2, num_slots=2, num_snapshots=0, max_model_len=longest, page_bytes=0,
            slot_bytes=0, weight_bytes=weights, activation_bytes=0, budget=0,
        )  # fmt: skip

    def _take_memory(self, limits: Limits) -> tuple[Any, Any]:
        session = OneSession(self.model, self.options.kv_cache_dtype)
        return session, session


def make_engine(model: Any, tokenizer: Any = None, options: EngineOptions | None = None, **more: Any) -> Engine:
    """The engine of a model, by its family."""
    kind = Engine if family(model.config).runs_in_engine else SingleEngine
    return kind(model, tokenizer, options, **more)


class OneSession:
    """Pool and runner of one request: a session, whose text is whatever stands in the one slot.

    A model that reads by windows gets its prompt as a whole, since what it makes of one depends on where a call ends.

    Raises:
        ValueError: keys and values of a dtype that the model cannot keep.
    """

    def __init__(self, model: Any, kv_cache_dtype: str = "auto") -> None:
        self.device = model.device
        kv_dtype = resolve_kv_dtype(kv_cache_dtype)
        self._session = open_session(model, cache_options={} if kv_dtype is None else {"dtype": kv_dtype})
        self._reads_whole = family(model.config).reads_by_windows
        self._unread: list[int] = []
        self._last = torch.zeros(1, dtype=torch.long)  # the token that was chosen last, [1]

    def nbytes(self) -> int:
        return self._session.nbytes()

    def release(self) -> None:
        self._session.reset()

    def clear_slot(self, slot: int) -> None:
        self._session.reset()
        self._unread = []

    def prefill(self, pieces: Sequence[Piece]) -> list[torch.Tensor | None]:
        """Read pieces. Where they are wanted, logits [P, V] stand for the hidden states that they come from."""
        return [self._read(piece) for piece in pieces]

    def _read(self, piece: Piece) -> torch.Tensor | None:
        if self._reads_whole:
            self._unread += piece.tokens
        elif piece.wanted:
            return self._session.score([torch.tensor(piece.tokens)])
        else:
            self._session.read(torch.tensor([piece.tokens]))
        return None

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def decode(self, rows: Sequence[Row]) -> torch.Tensor:
        """Logits [1, V] of the one row."""
        (row,) = rows
        tokens, self._unread = torch.tensor([[*self._unread, *row.tokens]]), []
        if row.tokens[-1] == UNREAD:
            tokens = self._last[:, None]
        return self._session.step(tokens) if tokens.shape[1] == 1 and row.start else self._session.read(tokens)

    def keep(self, rows: Sequence[Row], tokens: torch.Tensor) -> None:
        """As Runner.keep."""
        self._last = tokens.clamp(min=0)
