"""What self-decoder layers of softmax attention share, whatever a token sees: queries, keys and values of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from oncelm.models.split import COLUMNS, ROWS, Heads, Split
from oncelm.models.yoco.linear import Rounded, linear, project
from oncelm.models.yoco.mixers.base import Mixer, Tensors
from oncelm.ops import apply_rope

if TYPE_CHECKING:
    from oncelm.models.yoco.config import YocoConfig

PROJECTIONS = {"q_proj": "rope", "k_proj": "rope", "v_proj": "plain"}
FLOAT8_LAYERS = (*PROJECTIONS, "out_proj")


class SelfAttention(Mixer):
    """Causal softmax attention; with fewer key/value heads than query heads, groups of these share one."""

    groups_heads = True

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

    def after(self, o: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        return self.out_proj(o.flatten(2))

    @classmethod
    def describe(cls, config: YocoConfig) -> str:
        heads = f"{config.num_self_heads} heads of {config.self_head_dim}, {config.self_kv_heads} key/value heads"
        return f"attention, {heads}"

    @classmethod
    def numbers(cls, config: YocoConfig) -> int:
        """Of its matrices: q, out 2 d^2; k, v d c."""
        return 2 * config.hidden_size**2 + config.hidden_size * cls.cached(config)

    @classmethod
    def cached(cls, config: YocoConfig) -> int:
        """c, numbers that a token leaves in its cache."""
        return 2 * config.self_kv_heads * config.self_head_dim

    @classmethod
    def kept_numbers(cls, config: YocoConfig) -> int:
        return 3 * config.hidden_size + 3 * config.self_kv_heads * config.self_head_dim

    @classmethod
    def tensor_plan(cls, config: YocoConfig, ranks: int) -> dict[str, Split]:
        kv = Heads(config.self_kv_heads, config.self_head_dim)
        return {"q_proj": ROWS, "k_proj": kv, "v_proj": kv, "out_proj": COLUMNS}
