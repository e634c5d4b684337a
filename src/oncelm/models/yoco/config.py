"""The configuration of a YOCO model."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig

from oncelm.ops.rope import PAIRINGS, SPACINGS
from oncelm.utils.errors import check_choice, check_positive, check_whole, unknown

SELF_DECODERS = ("gated_retention", "sliding_window")
LAYOUTS = ("stacked", "unstacked", "interleaved")

# What transformers itself passes to a config, beside the fields: not a user's keys.
_TRANSFORMERS_KEYS = {
    "_attn_implementation", "_commit_hash", "_experts_implementation", "_name_or_path", "architectures",
    "attn_implementation", "auto_map", "experts_implementation", "model_type", "name_or_path", "output_attentions",
    "per_layer_config", "quantization_config", "torch_dtype", "transformers_version",
    *GenerationConfig._get_default_generation_params(),
}  # fmt: skip


@strict
class YocoConfig(PreTrainedConfig):
    """You Only Cache Once (arXiv 2405.05254).

    Args:
        vocab_size: rows of the embedding matrix.
        hidden_size: d, width of the residual stream.
        intermediate_size: width of the feed-forward layers.
        num_self_decoder_layers, num_cross_decoder_layers: layers of each half; either may be 0 (a model without a
            cross-decoder is a plain gRetNet or sliding-window Transformer).
        self_decoder: "gated_retention" or "sliding_window".
        num_self_heads: heads of a self-decoder layer.
        num_self_key_value_heads: key/value heads of a sliding-window layer; None means num_self_heads.
        num_attention_heads: query heads of a cross-decoder layer.
        num_key_value_heads: heads of the shared K/V cache; None means num_attention_heads.
        window_size: keys that a sliding-window query sees, itself included.
        layout: "stacked" (the cross-decoder continues from the self-decoder's output), "unstacked" (it starts from the
            embeddings and meets the self-decoder only in the cache), "interleaved" (self and cross layers alternate;
            the cache is written after the first self layer). The paper's ablation of layouts.
        rope_theta: base of the rotary frequencies.
        rope_pairing: "interleaved" (2j, 2j+1), official YOCO, or "half" (j, j + D/2), LLaMA.
        rope_spacing: "inclusive" theta^(-j / (D/2 - 1)), official YOCO, or "standard" theta^(-2j / D), LLaMA.
        gate_logit_normalizer: g = logsigmoid(x W) / this, in gated retention.
        rms_norm_eps: epsilon of every RMSNorm.
        scale_embeddings: multiply embeddings by sqrt(d).
        tie_word_embeddings: the output projection is the embedding matrix.
        max_position_embeddings: longest context that the model was trained on, in tokens; a statement, not a limit.
        use_cache: return a cache from forward in evaluation mode.

    Raises:
        ValueError: an unknown key (with the nearest known one), or values that do not fit together.
    """

    model_type = "oncelm_yoco"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: int = 100288
    hidden_size: int = 768
    intermediate_size: int = 2304
    num_self_decoder_layers: int = 6
    num_cross_decoder_layers: int = 6
    self_decoder: str = "gated_retention"
    num_self_heads: int = 3
    num_self_key_value_heads: int | None = None
    num_attention_heads: int = 12
    num_key_value_heads: int | None = None
    window_size: int = 1024
    layout: str = "stacked"
    rope_theta: float = 10000.0
    rope_pairing: str = "interleaved"
    rope_spacing: str = "inclusive"
    gate_logit_normalizer: int | float = 16
    rms_norm_eps: float = 1e-5
    scale_embeddings: bool = True
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 4096
    use_cache: bool = True
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        for key in kwargs:
            if key not in _TRANSFORMERS_KEYS:
                raise unknown("YocoConfig key", key, self.own_keys())
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_self_key_value_heads is None:
            self.num_self_key_value_heads = self.num_self_heads
        super().__post_init__(**kwargs)
        self._check()

    @classmethod
    def own_keys(cls) -> list[str]:
        """The keys described above."""
        return [name for name in cls.__annotations__ if not name.startswith("_")]

    def _check(self) -> None:
        check_choice("self_decoder", self.self_decoder, SELF_DECODERS)
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("rope_pairing", self.rope_pairing, PAIRINGS)
        check_choice("rope_spacing", self.rope_spacing, SPACINGS)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "window_size", "rope_theta", "num_self_heads",
                     "num_attention_heads", "num_key_value_heads", "num_self_key_value_heads"):  # fmt: skip
            check_positive(**{name: getattr(self, name)})
        for name in ("num_self_decoder_layers", "num_cross_decoder_layers"):
            check_whole(0, **{name: getattr(self, name)})
        if self.num_hidden_layers == 0:
            raise ValueError("a model needs a layer: num_self_decoder_layers and num_cross_decoder_layers are both 0.")
        if self.num_self_decoder_layers == 0 and self.layout != "stacked":
            raise ValueError(f"layout {self.layout!r} needs self-decoder layers; num_self_decoder_layers is 0.")
        if self.layout == "interleaved" and self.num_self_decoder_layers != self.num_cross_decoder_layers:
            raise ValueError(
                "layout 'interleaved' alternates self and cross layers and needs as many of each, got "
                f"{self.num_self_decoder_layers} and {self.num_cross_decoder_layers}."
            )
        for heads in ("num_self_heads", "num_attention_heads"):
            if self.hidden_size % getattr(self, heads) or (self.hidden_size // getattr(self, heads)) % 2:
                raise ValueError(
                    f"hidden_size {self.hidden_size} does not split into {heads} {getattr(self, heads)} heads of an "
                    "even dimension (RoPE rotates pairs)."
                )
        for heads, kv in (
            ("num_attention_heads", "num_key_value_heads"),
            ("num_self_heads", "num_self_key_value_heads"),
        ):
            if getattr(self, heads) % getattr(self, kv):
                raise ValueError(f"{heads} {getattr(self, heads)} is not a multiple of {kv} {getattr(self, kv)}.")
        if self.self_decoder == "gated_retention" and self.num_self_key_value_heads != self.num_self_heads:
            raise ValueError("gated retention has one key/value head a query head: leave num_self_key_value_heads out.")

    @property
    def num_hidden_layers(self) -> int:
        """Layers of both halves."""
        return self.num_self_decoder_layers + self.num_cross_decoder_layers

    @property
    def self_head_dim(self) -> int:
        """Dimension of a self-decoder head (K = V in gated retention)."""
        return self.hidden_size // self.num_self_heads

    @property
    def head_dim(self) -> int:
        """Dimension of a cross-decoder head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def self_kv_heads(self) -> int:
        """Key/value heads of a sliding-window layer."""
        return self.num_self_key_value_heads or self.num_self_heads

    @property
    def shared_kv_heads(self) -> int:
        """Heads of the shared key/value cache."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def layer_order(self) -> list[tuple[str, int]]:
        """("self" or "cross", index in that half) in the order of computation."""
        own = [("self", i) for i in range(self.num_self_decoder_layers)]
        cross = [("cross", i) for i in range(self.num_cross_decoder_layers)]
        if self.layout == "interleaved":
            return [layer for pair in zip(own, cross, strict=True) for layer in pair]
        return own + cross
