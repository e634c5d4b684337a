"""Sliding-window attention (YOCO, arXiv 2405.05254, section 3.2): each token sees the last few."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from oncelm.cache.batch import Batch
from oncelm.cache.yoco.interface import WindowPast
from oncelm.cache.yoco.window_kv import ChunkWindow, FreshWindow, WindowKV
from oncelm.models.work import causal_pairs
from oncelm.models.yoco.linear import Rounded, linear, project
from oncelm.models.yoco.mixers.base import COLUMNS, ROWS, Heads, Mixer, MixerWork, Room, Split, Tensors
from oncelm.models.yoco.mixers.registry import register_mixer
from oncelm.ops import apply_rope

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from oncelm.models.yoco.config import YocoConfig


@register_mixer("sliding_window")
class SlidingWindowAttention(Mixer):
    """Causal attention over the last `window_size` tokens."""

    projections = {"q_proj": "rope", "k_proj": "rope", "v_proj": "plain"}  # noqa: RUF012
    float8_layers = ("q_proj", "k_proj", "v_proj", "out_proj")
    in_cuda_graphs = True

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        d, self.head_dim = config.hidden_size, config.self_head_dim
        self.pairing = config.rope_pairing
        kv_dim = config.self_kv_heads * self.head_dim
        self.q_proj = linear(d, d)
        self.k_proj = linear(d, kv_dim)
        self.v_proj = linear(d, kv_dim)
        self.out_proj = linear(d, d)

    def before(self, h: torch.Tensor | Rounded, rotation: torch.Tensor) -> tuple[Tensors, None]:
        (q, k, v), _ = self.arrange(*project(h, self.q_proj, self.k_proj, self.v_proj))
        return (apply_rope(q, rotation, self.pairing), apply_rope(k, rotation, self.pairing), v), None

    def arrange(self, *projected: torch.Tensor) -> tuple[Tensors, None]:
        return tuple(x.unflatten(-1, (-1, self.head_dim)) for x in projected), None

    def mix(self, inputs: Tensors, past: WindowPast, batch: Batch) -> torch.Tensor:
        q, k, v = inputs
        return past.attend(q, k, v, batch)

    def after(self, o: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        return self.out_proj(o.flatten(2))

    @classmethod
    def new_cache(cls, config: YocoConfig, room: Room) -> WindowKV:
        shape = room.batch_size, config.window_size, config.self_kv_heads, config.self_head_dim
        return WindowKV(*shape, room.dtype, room.device)

    @classmethod
    def fresh_past(cls, config: YocoConfig) -> FreshWindow:
        return FreshWindow(config.window_size)

    @classmethod
    def chunk_past(cls, config: YocoConfig, group: ProcessGroup) -> ChunkWindow:
        return ChunkWindow(config.window_size, group)

    @classmethod
    def describe(cls, config: YocoConfig) -> str:
        heads = f"{config.num_self_heads} heads of {config.self_head_dim}, {config.self_kv_heads} key/value heads"
        return f"sliding-window attention, {heads}, window {config.window_size:,}"

    @classmethod
    def work(cls, config: YocoConfig) -> MixerWork:
        """q, out 2 d^2; k, v d c. A query and a key that meet cost 4 d."""
        d, W = config.hidden_size, config.window_size
        cached = 2 * config.self_kv_heads * config.self_head_dim
        return MixerWork(
            numbers=2 * d * d + d * cached,
            mixing=lambda T: 4 * d * causal_pairs(T, W),
            step=lambda S: 4 * d * min(S + 1, W),
            moved=lambda S, element_size: min(S + 1, W) * cached * element_size,
        )

    @classmethod
    def kept_numbers(cls, config: YocoConfig) -> int:
        return 3 * config.hidden_size + 3 * config.self_kv_heads * config.self_head_dim

    @classmethod
    def tensor_plan(cls, config: YocoConfig, ranks: int) -> dict[str, Split]:
        kv = Heads(config.self_kv_heads, config.self_head_dim)
        return {"q_proj": ROWS, "k_proj": kv, "v_proj": kv, "out_proj": COLUMNS}

    @classmethod
    def official_params(cls, config: YocoConfig) -> dict[str, Any]:
        return {"sliding_window": config.window_size}
