"""A LongLLaMA under measurement: windows read into memory, one preallocated tensor a memory layer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig

from oncelm.bench.gate import CHUNK, STEPS
from oncelm.bench.peer import SHAPE_KEYS
from oncelm.cache.longllama.cache import LongLlamaCache
from oncelm.models import LongLlamaConfig, LongLlamaForCausalLM
from oncelm.models.inputs import NOTHING
from oncelm.models.longllama.work import LongLlamaWork


def plain_config(config: LongLlamaConfig) -> LlamaConfig:
    """The Llama that a LongLLaMA is compared with: itself without memory, which keeps all keys of all layers."""
    return LlamaConfig(**{key: getattr(config, key) for key in SHAPE_KEYS}, attn_implementation="sdpa")


class LongLlama:
    """A LongLLaMA with its memory on its device, and exact.

    `chunk_size` says how many tokens stay out of memory, so that the gate's short text meets memory too.
    """

    name = "LongLLaMA"

    def __init__(self, model: LongLlamaForCausalLM, compile: bool = False) -> None:
        self.model, self.kv_dtype, self.compiled = model.compile_layers(compile), model.dtype, compile
        self.work = LongLlamaWork(model.config, model.dtype.itemsize)
        parts = "token-wise parts of layers" if compile else ""
        self.settings = {"cache": "LongLlamaCache, preallocated", "memory": "exact", "compiled": parts}

    def shape(self) -> dict[str, Any]:
        keys = (*SHAPE_KEYS, "mem_layers", "mem_dtype", "max_position_embeddings", "last_context_length")
        return {key: getattr(self.model.config, key) for key in keys}

    def full(self, ids: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():  # memory as the graph's tensors, without a cache
            output = self.model(ids, use_cache=False, last_context_length=self._local(CHUNK) + STEPS)
        return output.logits.detach()

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        last = self._local(CHUNK) + STEPS
        return self.model(ids, labels=ids, use_cache=False, last_context_length=last, logits_to_keep=NOTHING).loss

    def prefill(
        self, ids: torch.Tensor, room: int = 0, chunk_size: int | None = None
    ) -> tuple[torch.Tensor, LongLlamaCache]:
        cache = self.model.new_cache(ids.shape[0], ids.shape[1] + room)
        local = None if chunk_size is None else self._local(chunk_size)
        return self.model.prefill(ids, cache, last_context_length=local), cache

    def context(self, batch_size: int, tokens: int, room: int) -> LongLlamaCache:
        ids = torch.zeros(batch_size, tokens, dtype=torch.long, device=self.model.device)
        return self.prefill(ids, room)[1]

    def step(self, token: torch.Tensor, cache: LongLlamaCache) -> torch.Tensor:
        return self.model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1]

    def cache_bytes(self, cache: LongLlamaCache) -> int:
        return cache.nbytes()

    def _local(self, tokens: int) -> int:
        """Tokens to keep out of memory, so few that STEPS more fit into the window."""
        return min(tokens, self.model.config.max_position_embeddings - STEPS)
