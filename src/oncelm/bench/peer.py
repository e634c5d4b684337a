"""The other side: transformers' Llama of the same shape, run the best way that transformers offers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, StaticCache
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from oncelm.bench.targets import Target
from oncelm.models.family import SIZES
from oncelm.models.registry import family
from oncelm.models.session import Session, open_session
from oncelm.models.work import LlamaWork


def llama_config(config: PreTrainedConfig) -> LlamaConfig:
    """The Llama that a model of this configuration is compared with (`Family.peer_config`), with SDPA attention."""
    peer = family(config).peer_config(config)
    peer._attn_implementation = "sdpa"
    return peer


class PeerTarget(Target):
    """transformers' Llama with SDPA attention.

    Prefill is one pass into a DynamicCache with the logits of the last token only: chunks, or a StaticCache, bring an
    attention mask, which takes SDPA off its causal kernel. Decoding uses a StaticCache: a DynamicCache copies every
    layer's cache at every token.

    Args:
        compile: "model", for passes without a cache (training); "norms and feed-forward layers", for those with one,
            whose growth and whose layers' numbers would compile the attention anew each time; or "".
    """

    name = "Llama"
    is_peer = True

    def __init__(self, model: LlamaForCausalLM, compile: str = "") -> None:
        self.model, self.compiled, self.kv_dtype = model, bool(compile), model.dtype
        if compile == "model":
            model.compile()
        elif compile:
            for module in model.modules():
                if isinstance(module, LlamaMLP | LlamaRMSNorm):
                    module.compile(dynamic=True)
        self.work = LlamaWork(model.config, model.dtype.itemsize)
        self.settings = {
            "attention": "sdpa",
            "compiled": compile,
            "prefill_cache": "DynamicCache",
            "decode_cache": "StaticCache of random keys and values",
        }

    def shape(self) -> dict[str, Any]:
        return {key: getattr(self.model.config, key) for key in SIZES}

    def full(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, labels=ids, use_cache=False).loss

    def session(self, batch_size: int, tokens: int, room: int, chunk_size: int | None) -> Session:
        return open_session(self.model, batch_size, chunk_size=chunk_size or tokens)  # its cache grows, whatever room

    def context(self, batch_size: int, tokens: int, room: int) -> Session:
        """Random keys and values: time does not depend on them, and a real prefill is quadratic."""
        config, session = self.model.config, self.session(batch_size, tokens, room, None)
        session.cache = StaticCache(config=config, max_cache_len=tokens + room)
        shape = (batch_size, config.num_key_value_heads, tokens, config.head_dim)
        for layer in range(config.num_hidden_layers):
            k, v = (torch.randn(shape, dtype=self.model.dtype, device=self.model.device) for _ in "kv")
            session.cache.update(k, v, layer)
        return session
