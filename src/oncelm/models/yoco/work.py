"""FLOPs and bytes of a YOCO; each mixer counts its own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from oncelm.models.work import TRAINING_BYTES, Work, causal_pairs
from oncelm.models.yoco.config import YocoConfig
from oncelm.models.yoco.mixers import MixerWork, mixers_of


@dataclass(frozen=True)
class YocoWork:
    """The costs of a YOCO.

    Attributes:
        element_size: bytes of a number of the weights and of what mixers do not keep in float32.
        shared_element_size: bytes of a number of the shared cache, its share of a scale included; None: the same.
    """

    config: YocoConfig
    element_size: int
    shared_element_size: float | None = None

    @cached_property
    def mixers(self) -> list[MixerWork]:
        """Of each layer of the self-decoder."""
        counted = [(mixer, mixer.work(self.config)) for mixer in mixers_of(self.config)]
        if unknown := [mixer.__name__ for mixer, work in counted if work is None]:
            raise ValueError(f"nobody has counted what {unknown[0]} costs: give it a `work`.")
        return [work for _, work in counted if work is not None]

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
        own = sum(mixer.numbers + 3 * c.hidden_size * c.intermediate_size for mixer in self.mixers)
        return own + c.hidden_size * self.cached + ahead

    @property
    def weights(self) -> int:
        """Numbers in all matrices."""
        return self.read_whole + self.exiting * self.cross_layer + self.head

    def _forward(self, B: int, T: int, wanted: int, pairs: int) -> tuple[float, float]:
        """Linear and mixing FLOPs of T tokens with logits at `wanted` of them, which see `pairs` keys in all.

        Mixing, a layer of the cross-decoder: 4 d (pairs).
        """
        c, d = self.config, self.config.hidden_size
        linear = 2 * B * (T * self.read_whole + wanted * (self.exiting * self.cross_layer + self.head))
        own = sum(mixer.mixing(T) for mixer in self.mixers)
        cross = (c.num_cross_decoder_layers - self.exiting) * causal_pairs(T) + self.exiting * pairs
        return linear, B * (own + 4 * d * cross)

    def prefill(self, B: int, T: int) -> Work:
        """Self-decoder and shared K/V on T tokens; the cross-decoder and the head on the last one (early exit)."""
        linear, mixing = self._forward(B, T, wanted=1, pairs=T)
        shared = B * T * self.shared_bytes * (1 + self.exiting)  # written; read for the last token
        return Work(linear, mixing, self.weights * self.element_size + shared)

    def decode(self, B: int, S: int) -> Work:
        """Each cross-decoder layer reads (S + 1) c numbers; a self-decoder layer what its mixer keeps."""
        c, d = self.config, self.config.hidden_size
        sizes = self.element_size, self.shared_element_size or self.element_size
        own, moved = sum(mixer.step(S) for mixer in self.mixers), sum(mixer.moved(S, *sizes) for mixer in self.mixers)
        cross = c.num_cross_decoder_layers * (S + 1)
        return Work(
            linear=2 * B * self.weights,
            mixing=B * (own + 4 * d * cross),
            bytes=self.weights * self.element_size + B * (moved + cross * self.shared_bytes),
        )

    def train(self, B: int, T: int) -> Work:
        """The last token has no target: cross-decoder and head run on T - 1."""
        linear, mixing = self._forward(B, T, wanted=T - 1, pairs=causal_pairs(T - 1))
        return Work(3 * linear, 3 * mixing, TRAINING_BYTES * self.weights)
