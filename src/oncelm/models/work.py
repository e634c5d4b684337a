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

from transformers import LlamaConfig, PreTrainedConfig

from oncelm.models.longllama import LongLlamaConfig
from oncelm.models.yoco import YocoConfig
from oncelm.ops.crossbatch import earlier_contexts

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


@dataclass(frozen=True)
class LongLlamaWork(LlamaWork):
    """The costs of a LongLLaMA: w tokens a window, M memory layers, which see everything; the others see the window.

    Tokens kept out of memory at the end of a prefill (`last_context_length`) are counted as one more window.
    """

    config: LongLlamaConfig

    def _pairs(self, T: int) -> int:
        """(query, key) pairs in all layers of T tokens read from the start."""
        w, memory = self.config.max_position_embeddings, len(self.config.mem_layers)
        local = T // w * causal_pairs(w) + causal_pairs(T % w)
        return memory * causal_pairs(T) + (self.config.num_hidden_layers - memory) * local

    def _read(self, S: int) -> int:
        """Keys that one token behind S others meets in all layers; one without memory has half a window on average."""
        memory = len(self.config.mem_layers)
        local = min(S + 1, (self.config.max_position_embeddings + 1) // 2)
        return memory * (S + 1) + (self.config.num_hidden_layers - memory) * local

    def prefill(self, B: int, T: int) -> Work:
        """As a Llama's; only the memory layers keep all that they have seen."""
        layers, kept = self.config.num_hidden_layers, len(self.config.mem_layers)
        return Work(
            linear=2 * B * (T * layers * self.layer + self.head),
            mixing=4 * self.config.hidden_size * B * self._pairs(T),
            bytes=(self.weights + B * T * kept * self.cached) * self.element_size,
        )

    def decode(self, B: int, S: int) -> Work:
        return Work(
            linear=2 * B * self.weights,
            mixing=4 * self.config.hidden_size * B * self._read(S),
            bytes=(self.weights + B * self._read(S) * self.cached) * self.element_size,
        )

    def train(self, B: int, T: int) -> Work:
        """One forward and backward pass on B rows: with crossbatch, the memory layers also meet whole rows before."""
        c = self.config
        pairs = B * self._pairs(T)
        if c.cross_batch_range and c.mem_layers:
            seen = sum(earlier_contexts(B, c.cross_batch_range, c.cross_batch_stepping, c.dataset_packing))
            pairs += len(c.mem_layers) * seen * T * T
        return Work(3 * 2 * B * T * self.weights, 3 * 4 * c.hidden_size * pairs, TRAINING_BYTES * self.weights)


@dataclass(frozen=True)
class YocoWork:
    """The costs of a YOCO.

    Attributes:
        element_size: bytes of a number of the weights and windows (retention states are float32).
        shared_element_size: bytes of a number of the shared cache, its share of a scale included; None: the same.
    """

    config: YocoConfig
    element_size: int
    shared_element_size: float | None = None

    @property
    def shared_bytes(self) -> float:
        """That a token leaves in the shared cache."""
        return self.cached * (self.shared_element_size or self.element_size)

    @property
    def cached(self) -> int:
        """c of the shared cache; 0 without a cross-decoder."""
        c = self.config
        return 2 * c.shared_kv_heads * c.head_dim if c.num_cross_decoder_layers else 0

    @property
    def self_layer(self) -> int:
        """Numbers in the matrices of a self-decoder layer: feed-forward 3 d f, and

        gated retention: q, k, v, gate, out 5 d^2, decay d H;  sliding window: q, out 2 d^2, k, v d c.
        """
        c, d = self.config, self.config.hidden_size
        if c.self_decoder == "gated_retention":
            mixer = 5 * d * d + d * c.num_self_heads
        else:
            mixer = 2 * d * d + d * 2 * c.self_kv_heads * c.self_head_dim
        return mixer + 3 * d * c.intermediate_size

    @property
    def cross_layer(self) -> int:
        """Numbers in the matrices of a cross-decoder layer: q, out 2 d^2; feed-forward 3 d f."""
        d = self.config.hidden_size
        return 2 * d * d + 3 * d * self.config.intermediate_size

    @property
    def head(self) -> int:
        return self.config.hidden_size * self.config.vocab_size

    @property
    def exiting(self) -> int:
        """Cross-decoder layers behind the last self-decoder layer: these run on wanted positions only."""
        kinds = [kind for kind, _ in self.config.layer_order]
        return kinds[::-1].index("self") if "self" in kinds else len(kinds)

    @property
    def read_whole(self) -> int:
        """Numbers in the matrices that every token passes: the rest run on wanted positions only."""
        c = self.config
        ahead = (c.num_cross_decoder_layers - self.exiting) * self.cross_layer  # the interleaved layout has such
        return c.num_self_decoder_layers * self.self_layer + c.hidden_size * self.cached + ahead

    @property
    def weights(self) -> int:
        """Numbers in all matrices."""
        return self.read_whole + self.exiting * self.cross_layer + self.head

    def _forward(self, B: int, T: int, wanted: int, pairs: int) -> tuple[float, float]:
        """Linear and mixing FLOPs of T tokens with logits at `wanted` of them, which see `pairs` keys in all.

        Mixing, a layer: retention 4 T d D (k^T v and q S, each 2 D^2 a head); window and cross-decoder 4 d (pairs).
        """
        c, d = self.config, self.config.hidden_size
        linear = 2 * B * (T * self.read_whole + wanted * (self.exiting * self.cross_layer + self.head))
        own = T * c.self_head_dim if c.self_decoder == "gated_retention" else causal_pairs(T, c.window_size)
        cross = (c.num_cross_decoder_layers - self.exiting) * causal_pairs(T) + self.exiting * pairs
        return linear, 4 * d * B * (c.num_self_decoder_layers * own + cross)

    def prefill(self, B: int, T: int) -> Work:
        """Self-decoder and shared K/V on T tokens; the cross-decoder and the head on the last one (early exit)."""
        linear, mixing = self._forward(B, T, wanted=1, pairs=T)
        shared = B * T * self.shared_bytes * (1 + self.exiting)  # written; read for the last token
        return Work(linear, mixing, self.weights * self.element_size + shared)

    def decode(self, B: int, S: int) -> Work:
        """Each cross-decoder layer reads (S + 1) c numbers; a self-decoder layer its state or its window."""
        c, d = self.config, self.config.hidden_size
        seen = min(S + 1, c.window_size)
        if c.self_decoder == "gated_retention":
            own, own_bytes = c.self_head_dim, 2 * 4 * d * c.self_head_dim  # the state is read and written
        else:
            own, own_bytes = seen, seen * 2 * c.self_kv_heads * c.self_head_dim * self.element_size
        layers, cross = c.num_self_decoder_layers, c.num_cross_decoder_layers
        return Work(
            linear=2 * B * self.weights,
            mixing=4 * d * B * (layers * own + cross * (S + 1)),
            bytes=self.weights * self.element_size + B * (layers * own_bytes + cross * (S + 1) * self.shared_bytes),
        )

    def train(self, B: int, T: int) -> Work:
        """The last token has no target: cross-decoder and head run on T - 1."""
        linear, mixing = self._forward(B, T, wanted=T - 1, pairs=causal_pairs(T - 1))
        return Work(3 * linear, 3 * mixing, TRAINING_BYTES * self.weights)


def count_work(config: PreTrainedConfig, element_size: int) -> WorkCounts | None:
    """The costs of a model of that configuration; None where they are not known."""
    if isinstance(config, YocoConfig):
        return YocoWork(config, element_size)
    if isinstance(config, LongLlamaConfig):
        return LongLlamaWork(config, element_size)
    return LlamaWork(config, element_size) if isinstance(config, LlamaConfig) else None
