"""What prefill, decoding and training cost, in FLOPs and bytes, derived from a model's configuration.

Counted is what every implementation must do: a causal query meets the keys that it sees, not those that a kernel masks;
gated retention costs its recurrent form; elementwise work and normalisation are free; weights and caches move once, and
activations never leave the chip. So nothing reaches 100 % of its roofline, and two models' shares can be compared.

Legend: B sequences, T tokens, S tokens in the cache, d hidden size, f feed-forward width, H heads, D head dimension,
V vocabulary, W window, c = 2 H_kv D numbers that a token leaves in a cache. A multiplication and an addition are two
FLOPs: a token costs two for each number of a matrix that it passes. Embeddings are looked up and cost nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from transformers import LlamaConfig

# float32: weights read forward and backward, gradients written and read, three numbers of AdamW read and written
TRAINING_BYTES = 4 * (2 + 2 + 6)


@dataclass(frozen=True)
class Work:
    """The cost of one piece of work.

    Attributes:
        linear: FLOPs of the weight matrices, the output projection included.
        mixing: FLOPs of attention and retention, where tokens meet.
        bytes: of weights and caches.
    """

    linear: float
    mixing: float
    bytes: float

    @property
    def flops(self) -> float:
        return self.linear + self.mixing


class WorkCounts(Protocol):
    """The costs of a model. B sequences throughout."""

    def prefill(self, B: int, T: int) -> Work:
        """T tokens into an empty cache, and the logits of the last."""
        ...

    def decode(self, B: int, S: int) -> Work:
        """One token behind S cached ones, and its logits."""
        ...

    def train(self, B: int, T: int) -> Work:
        """Forward, backward (twice the forward) and an AdamW step, on T tokens."""
        ...


def causal_pairs(T: int, window: int | None = None) -> int:
    """(query, key) pairs of causal attention: T (T + 1) / 2; with a window, min(i, W) summed over i = 1..T."""
    W = T if window is None else min(window, T)
    return W * (W + 1) // 2 + (T - W) * W


@dataclass(frozen=True)
class LlamaWork:
    """The costs of a Llama; `element_size` is of weights and cache, in bytes."""

    config: LlamaConfig
    element_size: int

    @property
    def cached(self) -> int:
        """c of one layer."""
        return 2 * self.config.num_key_value_heads * self.config.head_dim

    @property
    def layer(self) -> int:
        """Numbers in the matrices of a layer: q, out 2 d^2; k, v d c; feed-forward 3 d f."""
        d, f = self.config.hidden_size, self.config.intermediate_size
        return 2 * d * d + d * self.cached + 3 * d * f

    @property
    def head(self) -> int:
        return self.config.hidden_size * self.config.vocab_size

    @property
    def weights(self) -> int:
        """Numbers in the matrices that a token passes."""
        return self.config.num_hidden_layers * self.layer + self.head

    def prefill(self, B: int, T: int) -> Work:
        """Every layer on every token: 2 T (layers) + 4 d (causal pairs) a layer; the head on the last one."""
        layers, d = self.config.num_hidden_layers, self.config.hidden_size
        return Work(
            linear=2 * B * (T * layers * self.layer + self.head),
            mixing=4 * d * B * layers * causal_pairs(T),
            bytes=(self.weights + B * T * layers * self.cached) * self.element_size,
        )

    def decode(self, B: int, S: int) -> Work:
        """Each layer reads its own cache: (S + 1) c numbers."""
        layers, d = self.config.num_hidden_layers, self.config.hidden_size
        return Work(
            linear=2 * B * self.weights,
            mixing=4 * d * B * layers * (S + 1),
            bytes=(self.weights + B * (S + 1) * layers * self.cached) * self.element_size,
        )

    def train(self, B: int, T: int) -> Work:
        layers, d = self.config.num_hidden_layers, self.config.hidden_size
        mixing = 4 * d * B * layers * causal_pairs(T)
        return Work(3 * 2 * B * T * self.weights, 3 * mixing, TRAINING_BYTES * self.weights)
