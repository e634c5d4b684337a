"""YOCO's layers (arXiv 2405.05254, sections 2 and 3), written once for training, generation, serving and scoring.

A layer is three parts. `before` and `after` work on single tokens: norms, projections, feed-forward. Between them `mix`
lets tokens meet, by calls of the layer's past. The mixers of the self-decoder are in `mixers/`, that of the
cross-decoder is here. A past knows what a batch is (dense or packed) and what came before it; one that is paged or
sharded over GPUs is another set of objects with the same methods.

The token-wise parts can be exchanged for others that compute the same (`TokenParts`): compiled ones, fused kernels.

Shapes: B rows, T tokens (packed: B = 1), d hidden size, H heads, D head dimension, P positions whose logits are wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from oncelm.cache import Batch, Past, Selection, SharedPast
from oncelm.models.plain import is_untouched, takes_parts
from oncelm.models.rms_norm import RMSNorm
from oncelm.models.yoco.config import YocoConfig
from oncelm.models.yoco.linear import Rounded, linear, project
from oncelm.models.yoco.mixers.base import Mixer, Tensors
from oncelm.models.yoco.mixers.registry import mixers_of
from oncelm.ops import apply_rope, rope_frequencies, rope_rotation, swiglu


class CrossAttention(Mixer):
    """Causal attention over the shared keys and values; only the queries are this layer's own (section 2.2)."""

    projections = {"q_proj": "rope"}  # noqa: RUF012
    in_cuda_graphs = True

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        d, self.head_dim = config.hidden_size, config.head_dim
        self.pairing = config.rope_pairing
        self.q_proj = linear(d, d)
        self.out_proj = linear(d, d)

    def before(self, h: torch.Tensor | Rounded, rotation: torch.Tensor) -> tuple[Tensors, None]:
        (q,), _ = self.arrange(*project(h, self.q_proj))
        return (apply_rope(q, rotation, self.pairing),), None

    def arrange(self, *projected: torch.Tensor) -> tuple[Tensors, None]:
        (q,) = projected
        return (q.unflatten(-1, (-1, self.head_dim)),), None

    def mix(self, inputs: Tensors, past: SharedPast, batch: Batch) -> torch.Tensor:
        (q,) = inputs
        return past.attend(q, batch)

    def after(self, o: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        return self.out_proj(o.flatten(2))


class FeedForward(nn.Module):
    """residual + fc2(silu(fc1(x)) * gate(x)); without gradients perhaps in residual's place."""

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.fc1 = linear(config.hidden_size, config.intermediate_size)
        self.gate = linear(config.hidden_size, config.intermediate_size)
        self.fc2 = linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + project(swiglu(*project(x, self.fc1, self.gate)), self.fc2)[0]


class DecoderLayer(GradientCheckpointingLayer):
    """x += mixer(norm(x)); x += ffn(norm(x)), in three parts around the place where tokens meet."""

    def __init__(self, config: YocoConfig, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer
        self.mixer_layer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = FeedForward(config)
        self.final_layer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def before(self, x: torch.Tensor, rotation: torch.Tensor) -> tuple[Tensors, torch.Tensor | None]:
        """From the layer's input x [B, T, d] to what `mixer.mix` needs, and the gate."""
        return self.mixer.before(self.mixer_layer_norm(x), rotation)

    def after(self, x: torch.Tensor, o: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """From x, what `mixer.mix` gave, o [B, T, H, D], and the gate to the layer's output [B, T, d]."""
        x = x + self.mixer.after(o, gate)
        return self.ffn(self.final_layer_norm(x), x)

    def forward(
        self,
        x: torch.Tensor,
        rotation: torch.Tensor,
        past: Any,
        batch: Batch,
        parts: TokenParts,
    ) -> torch.Tensor:
        if parts is PLAIN or not takes_parts(self):  # a hook on a module waits for the module to be called
            x = x + self.mixer(self.mixer_layer_norm(x), rotation, past, batch)
            return self.ffn(self.final_layer_norm(x), x)
        inputs, gate = parts.before(self, x, rotation)
        o = self.mixer.mix(inputs, past, batch)
        del inputs  # in a chunk of a long prompt, half of the memory that the feed-forward layer needs
        return parts.after(self, x, o, gate)


class SelfDecoder(nn.Module):
    """The layers that read the whole sequence."""

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config, mixer(config)) for mixer in mixers_of(config))

    def forward(
        self,
        x: torch.Tensor,
        rotation: torch.Tensor,
        pasts: Sequence[Any],
        batch: Batch,
        parts: Callable[[torch.Tensor], TokenParts],
    ) -> torch.Tensor:
        """x [B, T, d] -> [B, T, d]; each layer's past takes the batch in."""
        for layer, past in zip(self.layers, pasts, strict=True):
            x = layer(x, rotation, past, batch, parts(x))
        return x


class CrossDecoder(nn.Module):
    """The projections of the shared keys and values, and the layers that read them."""

    def __init__(self, config: YocoConfig) -> None:
        super().__init__()
        self.head_dim, self.pairing = config.head_dim, config.rope_pairing
        kv_dim = config.shared_kv_heads * config.head_dim
        self.k_proj = linear(config.hidden_size, kv_dim)
        self.v_proj = linear(config.hidden_size, kv_dim)
        self.kv_layer_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(
            DecoderLayer(config, CrossAttention(config)) for _ in range(config.num_cross_decoder_layers)
        )

    def keys_and_values(self, y: torch.Tensor, rotation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """shared_k, shared_v [B, T, H_kv, D] of the self-decoder's output y [B, T, d]."""
        projected = project(self.kv_layer_norm(y), self.k_proj, self.v_proj)
        k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in projected)
        return apply_rope(k, rotation, self.pairing), v

    def shared(
        self, y: torch.Tensor, rotation: torch.Tensor, parts: Callable[[torch.Tensor], TokenParts]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`keys_and_values`, computed as `parts` say unless there are hooks that they would pass over."""
        chosen = parts(y) if is_untouched(self.k_proj, self.v_proj, self.kv_layer_norm) else PLAIN
        return chosen.keys_and_values(self, y, rotation)

    def forward(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        rotate: Callable[[Batch], torch.Tensor],
        past: SharedPast,
        batch: Batch,
        wanted: Selection | None,
        parts: Callable[[torch.Tensor], TokenParts],
    ) -> torch.Tensor | None:
        """y [B, T, d] for the shared keys and values, x [B, T, d] to go on from -> hidden states [B, P, d] at `wanted`;
        None where nothing is wanted. rotate: of a batch's positions."""
        rotation = rotate(batch)
        past.append(*self.shared(y, rotation, parts), batch)
        if wanted is None:
            return None
        # without gaps, as the next layers get it: one compiled form serves all of them
        x = wanted.take(x).contiguous()
        if wanted.batch is not batch:
            rotation = rotate(wanted.batch)
        for layer in self.layers:
            x = layer(x, rotation, past, wanted.batch, parts(x))
        return x


class TokenParts(NamedTuple):
    """One way to compute all that is computed token by token. PLAIN defines it; any other gives the same, to rounding.

    Attributes:
        before, after: as in DecoderLayer, with the layer as first argument.
        keys_and_values: as in CrossDecoder, with the cross-decoder as first argument.
        head: logits [B, T, V] of the last layer's output [B, T, d], by the final norm and the output projection.
    """

    before: Callable[[DecoderLayer, torch.Tensor, torch.Tensor], tuple[Tensors, torch.Tensor | None]]
    after: Callable[[DecoderLayer, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
    keys_and_values: Callable[[CrossDecoder, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    head: Callable[[torch.Tensor, RMSNorm, nn.Linear], torch.Tensor]


PLAIN = TokenParts(
    DecoderLayer.before,
    DecoderLayer.after,
    CrossDecoder.keys_and_values,
    lambda x, norm, projection: projection(norm(x)),
)


def run_layers(
    config: YocoConfig,
    self_decoder: SelfDecoder,
    cross_decoder: CrossDecoder | None,
    embeddings: torch.Tensor,
    batch: Batch,
    past: Past,
    wanted: Selection | None,
    parts: Callable[[torch.Tensor], TokenParts] = lambda x: PLAIN,
) -> torch.Tensor | None:
    """Run all layers on a batch, each only on the positions that need it.

    The layers behind the last self layer mix no new tokens: what they compute at one position, no other position ever
    sees. So they run on the wanted positions only, whichever those are, and the result is exact.

    Args:
        embeddings: [B, T, d].
        past: what came before, read and extended: a YocoCache, or fresh pasts for a pass on its own.
        wanted: positions whose hidden states are asked for; None for none, as in all chunks of a prefill but the last.
        parts: how to compute a layer's token-wise parts on x [B, T or P, d].

    Returns:
        Hidden states [B, P, d] before the final norm, or None.
    """

    def rotate(at: Batch, head_dim: int) -> torch.Tensor:
        frequencies = rope_frequencies(head_dim, config.rope_theta, config.rope_spacing, embeddings.device)
        return rope_rotation(at.positions, frequencies)

    own = rotate(batch, config.self_head_dim)

    def rotate_cross(at: Batch) -> torch.Tensor:
        return own if at is batch and config.head_dim == config.self_head_dim else rotate(at, config.head_dim)

    if config.layout == "interleaved":
        return _run_in_turn(self_decoder, cross_decoder, embeddings, batch, past, wanted, parts, own, rotate_cross)
    y = self_decoder(embeddings, own, past.layers, batch, parts)
    if cross_decoder is not None:
        x = embeddings if config.layout == "unstacked" else y
        return cross_decoder(y, x, rotate_cross, past.shared, batch, wanted, parts)
    return None if wanted is None else wanted.take(y)


def _run_in_turn(
    self_decoder: SelfDecoder,
    cross_decoder: CrossDecoder | None,
    x: torch.Tensor,
    batch: Batch,
    past: Past,
    wanted: Selection | None,
    parts: Callable[[torch.Tensor], TokenParts],
    rotation: torch.Tensor,
    rotate_cross: Callable[[Batch], torch.Tensor],
) -> torch.Tensor | None:
    """run_layers where self and cross layers alternate; the cache is written after the first self layer."""
    assert cross_decoder is not None
    for name, decoder in (("self_decoder", self_decoder), ("cross_decoder", cross_decoder)):
        hooks = (
            decoder._forward_hooks, decoder._forward_pre_hooks, decoder._backward_hooks, decoder._backward_pre_hooks,
        )  # fmt: skip
        if any(hooks):
            raise ValueError(
                f"in layout 'interleaved' {name} is not called as a whole, so its hooks would never run: "
                f"register them on {name}.layers."
            )
    cross_rotation, last = rotate_cross(batch), len(self_decoder.layers) - 1
    for i, (own, cross) in enumerate(zip(self_decoder.layers, cross_decoder.layers, strict=True)):
        x = own(x, rotation, past.layers[i], batch, parts(x))
        if i == 0:
            past.shared.append(*cross_decoder.shared(x, cross_rotation, parts), batch)
        at = batch
        if i == last:  # the last cross layer mixes no new tokens
            if wanted is None:
                return None
            x, at = wanted.take(x).contiguous(), wanted.batch
            cross_rotation = cross_rotation if at is batch else rotate_cross(at)
        x = cross(x, cross_rotation, past.shared, at, parts(x))
    return x
