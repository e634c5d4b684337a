"""Sliding-window attention (YOCO, arXiv 2405.05254, section 3.2): each token sees the last few."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from oncelm.cache.batch import Batch
from oncelm.cache.yoco.interface import WindowPast
from oncelm.cache.yoco.window_kv import ChunkWindow, FreshWindow, WindowKV
from oncelm.models.work import causal_pairs
from oncelm.models.yoco.mixers.attention import FLOAT8_LAYERS, PROJECTIONS, SelfAttention
from oncelm.models.yoco.mixers.base import MixerWork, Room, Tensors
from oncelm.models.yoco.mixers.registry import register_mixer

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from oncelm.models.yoco.config import YocoConfig


@register_mixer("sliding_window")
class SlidingWindowAttention(SelfAttention):
    """Causal attention over the last `window_size` tokens."""

    projections = PROJECTIONS
    float8_layers = FLOAT8_LAYERS
    in_cuda_graphs = True

    def mix(self, inputs: Tensors, past: WindowPast, batch: Batch) -> torch.Tensor:
        q, k, v = inputs
        return past.attend(q, k, v, batch)

    @classmethod
    def new_cache(cls, config: YocoConfig, room: Room) -> WindowKV:
        shape = room.batch_size, config.window_size, config.self_kv_heads, config.self_head_dim
        return WindowKV(*shape, room.dtype, room.device)

    @classmethod
    def fresh_past(cls, config: YocoConfig) -> FreshWindow:
        return FreshWindow(config.window_size)

    @classmethod
    def chunk_past(cls, config: YocoConfig) -> Callable[[ProcessGroup], ChunkWindow]:
        return partial(ChunkWindow, config.window_size)

    @classmethod
    def describe(cls, config: YocoConfig) -> str:
        return f"sliding-window {super().describe(config)}, window {config.window_size:,}"

    @classmethod
    def work(cls, config: YocoConfig) -> MixerWork:
        """A query and a key that meet cost 4 d."""
        d, W, cached = config.hidden_size, config.window_size, cls.cached(config)
        return MixerWork(
            numbers=cls.numbers(config),
            mixing=lambda T: 4 * d * causal_pairs(T, W),
            step=lambda S: 4 * d * min(S + 1, W),
            moved=lambda S, element_size, _: min(S + 1, W) * cached * element_size,
        )

    @classmethod
    def official_params(cls, config: YocoConfig) -> dict[str, Any]:
        return {"sliding_window": config.window_size}
