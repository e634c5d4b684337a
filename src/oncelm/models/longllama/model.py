"""LongLLaMA's layers: LLaMA's, with LLaMA's weight names; tokens meet each other in one call, `memory.attend`.

Shapes: B rows, T tokens of one window (packed: B = 1), d hidden size, H heads, H_kv key/value heads, D head dimension.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from oncelm.cache.window import Window
from oncelm.models.longllama.config import LongLlamaConfig
from oncelm.models.rms_norm import RMSNorm
from oncelm.ops import apply_rope, rope_frequencies, rope_rotation, swiglu


class LayerMemory(Protocol):
    """What one layer attends to: LocalKV, MemoryKV, RemoteMemory, FreshLocal, FreshMemory or CrossbatchMemory."""

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, raw_k: torch.Tensor, v: torch.Tensor, window: Window
    ) -> torch.Tensor:
        """q [B, T, H, D] and k [B, T, H_kv, D] rotated, raw_k as at position 0, v [B, T, H_kv, D] -> [B, T, H, D]."""
        ...


class Attention(nn.Module):
    """Causal attention in the window; in a memory layer also over everything before it (section 3.1)."""

    def __init__(self, config: LongLlamaConfig, is_memory_layer: bool) -> None:
        super().__init__()
        d, self.head_dim, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.rotates = config.mem_positionals or not is_memory_layer
        self.q_proj = nn.Linear(d, config.num_attention_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(d, config.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(d, config.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, d, bias=bias)

    def forward(self, x: torch.Tensor, rope: Rope, memory: LayerMemory, window: Window) -> torch.Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        raw_k = k
        if self.rotates:
            q, k, raw_k = rope.rotate(q), rope.rotate(k), rope.rotate_to_start(k)
        return self.o_proj(memory.attend(q, k, raw_k, v, window).flatten(2))


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

    def forward(self, x: torch.Tensor, rope: Rope, memory: LayerMemory, window: Window) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, memory, window)
        return x + self.mlp(self.post_attention_layernorm(x))


class LongLlamaModel(nn.Module):
    """Embeddings, layers and final norm: one window at a time."""

    def __init__(self, config: LongLlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i in config.mem_layers) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, tokens: torch.Tensor, memories: list[Any], window: Window) -> torch.Tensor:
        """Hidden states [B, T, d] of token ids [B, T] or embeddings [B, T, d]; each layer's memory takes them in."""
        x = tokens if tokens.is_floating_point() else self.embed_tokens(tokens)
        rope = Rope(self.config, window.batch.positions)
        for layer, memory in zip(self.layers, memories, strict=True):
            x = layer(x, rope, memory, window)
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

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, H, D] by its positions."""
        return apply_rope(x, self.rotation, "half")

    def rotate_to_start(self, x: torch.Tensor) -> torch.Tensor:
        """x as at position 0, where memory stands: no rotation, but a scaling's factor."""
        return x if self.factor == 1.0 else x * self.factor
