"""What is measured: a model behind the same few calls, whatever its family is. peer.py has the one beside it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from transformers import PreTrainedModel

from oncelm.bench.gate import CHUNK, STEPS
from oncelm.models.causal_lm import CausalLM
from oncelm.models.inputs import NOTHING
from oncelm.models.load import set_execution
from oncelm.models.session import Session, open_session
from oncelm.models.work import WorkCounts
from oncelm.ops.quantize import LARGEST


class Target(ABC):
    """A model under measurement, in sessions. Ids are [B, T].

    Attributes:
        settings: how it is run, for the record.
        compiled: by torch.compile, so that the first call of a kind takes much longer.
        kv_dtype: of the keys and values in its cache.
        work: what it costs; None where a mixer of its does not say.
        is_peer: whether it is there to be compared with.
    """

    name: str
    model: Any
    work: WorkCounts | None
    settings: dict[str, Any]
    compiled: bool
    kv_dtype: torch.dtype
    is_peer = False

    @abstractmethod
    def shape(self) -> dict[str, Any]:
        """The configuration keys that fix sizes, for the record."""

    @abstractmethod
    def full(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [B, T, V] of one pass over all of `ids`, in plain PyTorch: what faster ways are compared with."""

    @abstractmethod
    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean loss of the same pass, as training computes it."""

    @abstractmethod
    def session(self, batch_size: int, tokens: int, room: int, chunk_size: int | None) -> Session:
        """A session to read `tokens` tokens of each row, with room for `room` more.

        `chunk_size` None means the target's own choice.
        """

    def prefill(self, ids: torch.Tensor, room: int = 0, chunk_size: int | None = None) -> tuple[torch.Tensor, Session]:
        """Read `ids` from the start: logits [B, V] of the last token, and the session to go on in."""
        session = self.session(ids.shape[0], ids.shape[1], room, chunk_size)
        return session.read(ids), session

    def context(self, batch_size: int, tokens: int, room: int) -> Session:
        """A session as it is behind `tokens` tokens, for timing what follows."""
        return self.prefill(torch.zeros(batch_size, tokens, dtype=torch.long, device=self.model.device), room)[1]


class OwnTarget(Target):
    """A model of one of OnceLM's families, read into a preallocated cache: in chunks, or by windows into memory.

    Args:
        prefill_chunk_size: None leaves it to the model, which looks at the free memory. Where a model reads by windows,
            a chunk says how many tokens stay out of memory, so that the gate's short text meets memory too.
        compile: see `compile_layers`.
        quantization: one of `Family.quantizations`.
        kv_dtype: as `dtype` of `new_cache`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prefill_chunk_size: int | None = None,
        compile: bool = False,
        quantization: str | None = None,
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.model: CausalLM = set_execution(model, "this model", compile, quantization)
        self.name, self.compiled = self.model.title, compile
        self.cache_options = {} if kv_dtype is None else {"dtype": kv_dtype}
        self.kv_dtype = kv_dtype or self.model.kv_dtype
        config, element = model.config, model.dtype.itemsize
        a_scale = 4 / config.head_dim if self.kv_dtype in LARGEST else 0
        self.work = self.model.work(config, element, self.kv_dtype.itemsize + a_scale)
        self.prefill_chunk_size = prefill_chunk_size
        self.settings = {
            "cache": f"{type(self.model.new_cache(1, 1)).__name__}, preallocated",
            "kv_dtype": str(self.kv_dtype).removeprefix("torch."),
            "prefill_chunk_size": prefill_chunk_size,  # the one in use, as soon as there is one
            "compiled": "token-wise parts of layers" if compile else "",
            "quantization": quantization or str(model.dtype).removeprefix("torch."),
        }

    def shape(self) -> dict[str, Any]:
        return {key: getattr(self.model.config, key) for key in self.model.config.stated_keys()}

    def full(self, ids: torch.Tensor) -> torch.Tensor:
        chosen = self.settings["quantization"]
        quantization = chosen if chosen in self.model.quantizations else None
        set_execution(self.model, self.name, False, None)
        with torch.set_grad_enabled(self.model.reads_by_windows):  # memory is then the graph's tensors, without a cache
            logits = self.model(ids, use_cache=False, **self._all_local()).logits.detach()
        set_execution(self.model, self.name, self.compiled, quantization)
        return logits

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, labels=ids, use_cache=False, logits_to_keep=NOTHING, **self._all_local()).loss

    def session(self, batch_size: int, tokens: int, room: int, chunk_size: int | None) -> Session:
        read_options, size = {}, None
        if not self.model.reads_by_windows:
            size = chunk_size or self.prefill_chunk_size or self.model.prefill_chunk_size(batch_size)
            self.settings["prefill_chunk_size"] = size
        elif chunk_size is not None:
            read_options = self.model.local_options(self.model.config, chunk_size, STEPS)
        options: dict[str, Any] = {"cache_options": self.cache_options, "read_options": read_options}
        return open_session(self.model, batch_size, tokens + room, size, **options)

    def _all_local(self) -> dict[str, Any]:
        """What makes local, in one pass, what is local behind the gate's prefill and steps."""
        return self.model.local_options(self.model.config, CHUNK + STEPS)
