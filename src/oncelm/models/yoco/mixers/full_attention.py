"""Full attention in the self-decoder: each token sees all before it, as in a Transformer, which a layer may come from.

Its keys and values are stored like the shared K/V, by a past with the same two methods, but no other layer reads them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from oncelm.cache.batch import Batch
from oncelm.cache.yoco.interface import SharedPast
from oncelm.cache.yoco.shared_kv import ChunkShared, FreshShared, SharedKV
from oncelm.models.work import causal_pairs
from oncelm.models.yoco.mixers.attention import FLOAT8_LAYERS, PROJECTIONS, SelfAttention
from oncelm.models.yoco.mixers.base import MixerWork, Room, Tensors
from oncelm.models.yoco.mixers.registry import register_mixer

if TYPE_CHECKING:
    from oncelm.models.yoco.config import YocoConfig


@register_mixer("full_attention")
class FullAttention(SelfAttention):
    """Causal attention over all tokens."""

    projections = PROJECTIONS
    float8_layers = FLOAT8_LAYERS
    in_cuda_graphs = True

    def mix(self, inputs: Tensors, past: SharedPast, batch: Batch) -> torch.Tensor:
        q, k, v = inputs
        past.append(k, v, batch)
        return past.attend(q, batch)

    @classmethod
    def new_cache(cls, config: YocoConfig, room: Room) -> SharedKV:
        heads = config.self_kv_heads, config.self_head_dim
        return SharedKV(room.batch_size, room.max_tokens, *heads, room.kv_dtype, room.device)

    @classmethod
    def fresh_past(cls, config: YocoConfig) -> FreshShared:
        return FreshShared()

    @classmethod
    def chunk_past(cls, config: YocoConfig) -> type[ChunkShared]:
        return ChunkShared

    @classmethod
    def describe(cls, config: YocoConfig) -> str:
        return f"full {super().describe(config)}"

    @classmethod
    def work(cls, config: YocoConfig) -> MixerWork:
        """A query and a key that meet cost 4 d."""
        d, cached = config.hidden_size, cls.cached(config)
        return MixerWork(
            numbers=cls.numbers(config),
            mixing=lambda T: 4 * d * causal_pairs(T),
            step=lambda S: 4 * d * (S + 1),
            moved=lambda S, _, kv_element_size: (S + 1) * cached * kv_element_size,
        )
