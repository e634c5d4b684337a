"""LongLLaMA's layers: LLaMA's, with LLaMA's weight names; tokens meet each other in one call, `memory.attend`.

The code before and after that call works on single tokens and may be compiled (`Parts`).

Shapes: B rows, T tokens of one window (packed: B = 1), d hidden size, H heads, H_kv key/value heads, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from oncelm.cache.longllama.segment import LayerMemory, Segment
from oncelm.models.compiling import compiled
from oncelm.models.longllama.config import LongLlamaConfig
from oncelm.models.plain import takes_parts
from oncelm.models.rms_norm import RMSNorm
from oncelm.ops import apply_rope, rope_frequencies, rope_rotation, swiglu


class Attention(nn.Module):
    """Causal attention in the window; in a memory layer also over everything before it (section 3.1)."""

    def __init__(self, config: LongLlamaConfig, is_memory_layer: bool) -> None:
        super().__init__()
        d, self.head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.is_memory_layer, self.rotates = is_memory_layer, config.mem_positionals or not is_memory_layer
        self.q_proj = nn.Linear(d, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, d, bias=bias)

    def before(self, h: torch.Tensor, rotation: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """h [B, T, d] -> q [B, T, H, D], k and v [B, T, H_kv, D]; in a memory layer also k before its rotation."""
        q, k, v = (proj(h).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        raw = (k,) if self.is_memory_layer else ()
        if self.rotates:
            q, k = apply_rope(q, rotation, "half"), apply_rope(k, rotation, "half")
        return q, k, v, *raw

    def mix(self, inputs: tuple[torch.Tensor, ...], rope: Rope, memory: LayerMemory, segment: Segment) -> torch.Tensor:
        """What `before` gave -> o [B, T, H, D]."""
        q, k, v, *raw = inputs
        raw_k = rope.at_start(raw[0]) if raw and self.rotates else k
        return memory.attend(q, k, raw_k, v, segment)

    def forward(self, h: torch.Tensor, rope: Rope, memory: LayerMemory, segment: Segment) -> torch.Tensor:
        """h [B, T, d] -> [B, T, d], to be added to the residual stream."""
        return self.o_proj(self.mix(self.before(h, rope.rotation), rope, memory, segment).flatten(2))


class MLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(self, config: LongLlamaConfig) -> None:
        super().__init__()
        d, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, inner, bias=bias)
        self.up_proj = nn.Linear(d, inner, bias=bias)
        self.down_proj = nn.Linear(inner, d, bias=bias)
        self.activation = None if config.hidden_act == "silu" else ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(swiglu(gate, up) if self.activation is None else self.activation(gate) * up)


class DecoderLayer(GradientCheckpointingLayer):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: LongLlamaConfig, is_memory_layer: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config, is_memory_layer)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def before(self, x: torch.Tensor, rotation: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.self_attn.before(self.input_layernorm(x), rotation)

    def after(self, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        """x [B, T, d], and o [B, T, H, D] that the memory gave."""
        x = x + self.self_attn.o_proj(o.flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))

    def forward(self, x: torch.Tensor, rope: Rope, memory: LayerMemory, segment: Segment, parts: Parts) -> torch.Tensor:
        if parts is PLAIN or not takes_parts(self):  # a hook on a module waits for the module to be called
            x = x + self.self_attn(self.input_layernorm(x), rope, memory, segment)
            return x + self.mlp(self.post_attention_layernorm(x))
        return parts.after(self, x, self.self_attn.mix(parts.before(self, x, rope.rotation), rope, memory, segment))


class Parts(NamedTuple):
    """How to compute a layer's token-wise parts."""

    before: Callable
    after: Callable


PLAIN = Parts(DecoderLayer.before, DecoderLayer.after)


@functools.cache
def compiled_parts(gradients: bool) -> Parts:
    """The parts, each in a compiled form for memory layers and one for the others."""

    def part(plain: Callable) -> Callable:
        def run(layer: DecoderLayer, *inputs: torch.Tensor) -> Any:
            kind = "memory_layer" if layer.self_attn.is_memory_layer else "local_layer"
            return compiled(plain, kind, gradients)(layer, *inputs)

        return run

    return Parts(part(DecoderLayer.before), part(DecoderLayer.after))


class Backbone(nn.Module):
    """Embeddings, layers and final norm: one window at a time."""

    def __init__(self, config: LongLlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i in config.mem_layers) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        tokens: torch.Tensor,
        memories: list[Any],
        segment: Segment,
        parts: Callable[[torch.Tensor], Parts] = lambda x: PLAIN,
    ) -> torch.Tensor:
        """Hidden states [B, T, d] of token ids [B, T] or embeddings [B, T, d]; each layer's memory takes them in.

        parts: how to compute a layer's token-wise parts on x [B, T, d].
        """
        x = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        rope = Rope(self.config, segment.batch.positions)
        for layer, memory in zip(self.layers, memories, strict=True):
            x = layer(x, rope, memory, segment, parts(x))
        return self.norm(x)


class Rope:
    """LLaMA's rotary embedding (half-split pairs) for one window, with any of transformers' scalings.

    positions: [B or 1, T], counted from the window's start.
    """

    def __init__(self, config: LongLlamaConfig, positions: torch.Tensor) -> None:
        kind, self.factor = config.rope_parameters["rope_type"], 1.0
        if kind == "default":
            theta = config.rope_parameters["rope_theta"]
            frequencies = rope_frequencies(config.head_dim, theta, "standard", positions.device)
        else:
            frequencies, self.factor = ROPE_INIT_FUNCTIONS[kind](config, positions.device)
        self.rotation = rope_rotation(positions, frequencies) * self.factor

    def at_start(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, H, D] as at position 0, where memory stands: no rotation, but a scaling's factor."""
        return x if self.factor == 1.0 else x * self.factor
