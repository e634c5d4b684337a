"""The configuration of a YOCO model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from huggingface_hub.dataclasses import strict

from oncelm.models.own_config import OwnConfig, checked
from oncelm.models.yoco.mixers.registry import CROSS_ATTENTION, kinds_of, mixer_names
from oncelm.ops.rope import PAIRINGS, SPACINGS
from oncelm.utils.constraints import POSITIVE, Constraint, Count, Each, Number, OneOf, Positive, Whole
from oncelm.utils.errors import shown, unknown

T = TypeVar("T")

LAYOUTS = ("stacked", "unstacked", "interleaved")
SAID = ("num_self_decoder_layers", "num_cross_decoder_layers", "self_decoder", "layout")  # by layer_types
# names of transformers and flash-linear-attention, which are like another's of ours, or like none
ELSEWHERE = {"sliding_attention": "sliding_window", "gated_deltanet": "gated_delta", "gated_delta_net": "gated_delta"}

Width = Annotated[int, Whole(1, 2**24)]
Layers = Annotated[int, Whole(0, 4096)]
Heads = Annotated[int, Whole(1, 2**16)]
Token = Annotated[int, Whole(0)]


@dataclass(frozen=True)
class MixerName(Constraint):
    """The name of a mixer, of OnceLM or registered from outside; `others` are allowed too."""

    others: tuple[str, ...] = ()
    optional: bool = False

    def check(self, name: str, value: Any) -> str:
        allowed = (*mixer_names(), *self.others)
        if isinstance(value, str) and value in ELSEWHERE and value not in allowed:
            raise ValueError(f"{name}: what others call {value!r} is {ELSEWHERE[value]!r} here.")
        if not isinstance(value, str) or value not in allowed:
            hint = "A mixer of your own is known once its file has been imported."
            raise ValueError(f"{unknown(name, value, allowed)} {hint}")
        return value

    def describe(self) -> str:
        return "the name of a mixer"


LAYER_TYPES = Each(MixerName((CROSS_ATTENTION,)), optional=True)


def in_turn(own: list[T], crosses: list[T]) -> list[T]:
    """One of each in turn, as far as both go."""
    return [one for pair in zip(own, crosses, strict=False) for one in pair]


def changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Keys of a YocoConfig with changes, among which `layer_types` takes the place of all that says the same."""
    kept = {key: value for key, value in settings.items() if key not in SAID or changes.get("layer_types") is None}
    return {**kept, **changes}


@checked
@strict
class YocoConfig(OwnConfig):
    """You Only Cache Once (arXiv 2405.05254).

    Args:
        vocab_size: rows of the embedding matrix.
        hidden_size: d, width of the residual stream.
        intermediate_size: width of the feed-forward layers.
        num_self_decoder_layers, num_cross_decoder_layers: layers of each half; either may be 0 (a model without a
            cross-decoder is a plain gRetNet or sliding-window Transformer).
        self_decoder: the mixer of all layers of the self-decoder: "gated_retention", "sliding_window",
            "full_attention", "gated_delta" or a registered one; None where they have several.
        layer_types: the mixer of each layer, in the order of computation, "cross_attention" for those of the
            cross-decoder. A hybrid is said by this list alone, which implies how many layers the halves have. None
            means what the other keys say, and becomes that list.
        num_self_heads: heads of a self-decoder layer.
        num_self_key_value_heads: key/value heads of a sliding-window or full-attention layer; None means
            num_self_heads.
        num_attention_heads: query heads of a cross-decoder layer.
        num_key_value_heads: heads of the shared K/V cache; None means num_attention_heads.
        window_size: keys that a sliding-window query sees, itself included.
        conv_size: tokens that the short convolution of a gated-delta layer sees, the own included.
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
        ValueError: an unknown key (with the nearest known one), a value that its key cannot have, also when it is set
            later, or values that do not fit together. In a file, unknown keys that are like none of these are kept.
    """

    model_type = "oncelm_yoco"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    vocab_size: Annotated[int, Whole(1, 2**31 - 1)] = 100288
    hidden_size: Width = 768
    intermediate_size: Width = 2304
    num_self_decoder_layers: Layers = 6
    num_cross_decoder_layers: Layers = 6
    self_decoder: Annotated[str | None, MixerName()] = "gated_retention"
    layer_types: Annotated[list[str] | None, LAYER_TYPES] = None
    num_self_heads: Heads = 3
    num_self_key_value_heads: Heads | None = None
    num_attention_heads: Heads = 12
    num_key_value_heads: Heads | None = None
    window_size: Count = 1024
    conv_size: Annotated[int, Whole(1, 64)] = 4
    layout: Annotated[str, OneOf(LAYOUTS)] = "stacked"
    rope_theta: Positive = 10000.0
    rope_pairing: Annotated[str, OneOf(PAIRINGS)] = "interleaved"
    rope_spacing: Annotated[str, OneOf(SPACINGS)] = "inclusive"
    gate_logit_normalizer: Annotated[int | float, POSITIVE] = 16
    rms_norm_eps: Annotated[float, Number(0, 1, open_low=True)] = 1e-5
    scale_embeddings: bool = True
    tie_word_embeddings: bool = False
    max_position_embeddings: Count = 4096
    use_cache: bool = True
    bos_token_id: Token | None = 0
    pad_token_id: Token | None = 1
    eos_token_id: Annotated[int | list[int] | None, Each(Whole(0), or_one=True)] = 2

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.num_self_key_value_heads is None:
            self.num_self_key_value_heads = self.num_self_heads
        super().__post_init__(**kwargs)
        self._check_halves()
        if self.layer_types is None and self.self_decoder is not None:
            self.layer_types = self._types()
        self._check()

    def __setattr__(self, name: str, value: Any) -> None:
        """As of any object; `layer_types`, said when a configuration is made, follows the keys that say the same."""
        is_new = name not in self.__dict__ or self.layer_types is None or getattr(self, name) == value
        if is_new or name not in (*SAID, "layer_types"):
            super().__setattr__(name, value)
            return
        if name == "layer_types" or self.self_decoder is None or value is None:
            how = "make another, YocoConfig.from_dict(config.to_dict(), layer_types=...)"
            raise ValueError(
                f"the layers of a configuration are said when it is made: instead of setting {name}, {how}."
            )
        super().__setattr__(name, value)
        super().__setattr__("layer_types", self._types())

    def _types(self) -> list[str]:
        """`layer_types` as the other keys say it."""
        own = [self.self_decoder or ""] * self.num_self_decoder_layers
        crosses = [CROSS_ATTENTION] * self.num_cross_decoder_layers
        return in_turn(own, crosses) if self.layout == "interleaved" else own + crosses

    @classmethod
    def completed(cls, settings: dict[str, Any]) -> dict[str, Any]:
        """`layer_types` says how many layers the halves have, of which mixers and in which order."""
        types = LAYER_TYPES("layer_types", settings.get("layer_types"))
        if types is None:
            return settings
        own = [name for name in types if name != CROSS_ATTENTION]
        crosses = [CROSS_ATTENTION] * (len(types) - len(own))
        if types not in (own + crosses, in_turn(own, crosses)):
            raise ValueError(
                "layer_types must name the layers of the self-decoder first, then those of the cross-decoder "
                f"({CROSS_ATTENTION}), or one of each in turn, got {shown(types)}."
            )
        implied: dict[str, Any] = {"num_self_decoder_layers": len(own), "num_cross_decoder_layers": len(crosses)}
        if own:
            implied["self_decoder"] = own[0] if len(set(own)) == 1 else None
        if types != own + crosses:
            implied["layout"] = "interleaved"
        for key, value in implied.items():
            if settings.get(key, value) != value:
                raise ValueError(f"layer_types says {key}={value!r}, got {shown(settings[key])}: leave {key} out.")
        return {**settings, **implied}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As for every configuration of OnceLM; `layer_types` given beside the dict takes the place of what it says."""
        own = {key: kwargs.pop(key) for key in cls.own_keys() if key in kwargs}
        return super().from_dict(changed(config_dict, own), **kwargs)

    changed = staticmethod(changed)

    def to_dict(self) -> dict[str, Any]:
        """As in Hugging Face, without a `layer_types` that follows from the other keys."""
        says_nothing = {"layer_types"} - set(self.stated_keys())
        return {key: value for key, value in super().to_dict().items() if key not in says_nothing}

    def stated_keys(self) -> list[str]:
        """The keys that say what the model is. Of those that came after the first saved caches, which their
        fingerprints lack, only what does not go without saying."""
        silent = {"layer_types"} if self.self_decoder is not None else set()
        if self.conv_size == type(self).conv_size:
            silent.add("conv_size")
        return [key for key in self.own_keys() if key not in silent]

    def validate_layer_type(self) -> None:
        """transformers knows none of these types; they are checked where they are set."""

    def _check_halves(self) -> None:
        if self.num_hidden_layers == 0:
            raise ValueError("a model needs a layer: num_self_decoder_layers and num_cross_decoder_layers are both 0.")
        if self.num_self_decoder_layers == 0 and self.layout != "stacked":
            raise ValueError(f"layout {self.layout!r} needs self-decoder layers; num_self_decoder_layers is 0.")
        if self.layout == "interleaved" and self.num_self_decoder_layers != self.num_cross_decoder_layers:
            raise ValueError(
                "layout 'interleaved' alternates self and cross layers and needs as many of each, got "
                f"{self.num_self_decoder_layers} and {self.num_cross_decoder_layers}."
            )

    def _check(self) -> None:
        if self.layer_types is None:
            raise ValueError("name the mixer of all layers with self_decoder, or of each with layer_types.")
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
        kinds = list(kinds_of(self))
        grouped = self.num_self_key_value_heads != self.num_self_heads
        if grouped and kinds and not any(mixer.groups_heads for mixer in kinds):
            raise ValueError(
                f"{self.self_layer_types[0]} has one key/value head a query head: leave num_self_key_value_heads out."
            )

    @property
    def self_layer_types(self) -> list[str]:
        """The mixer of each layer of the self-decoder."""
        if self.self_decoder is not None:
            return [self.self_decoder] * self.num_self_decoder_layers
        return [name for name in self.layer_types or () if name != CROSS_ATTENTION]

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
    def kv_sharing_modes(self) -> list[str]:
        """What transformers (from 5.23 on) asks to lay out a cache of its own: no layer holds anything in one, and the
        model refuses it. OnceLM's own caches are made by `new_cache`."""
        return ["reuse"] * self.num_hidden_layers

    @property
    def num_kv_shared_layers(self) -> int:
        """The same for older transformers."""
        return self.num_hidden_layers

    @property
    def layer_order(self) -> list[tuple[str, int]]:
        """("self" or "cross", index in that half) in the order of computation."""
        own = [("self", i) for i in range(self.num_self_decoder_layers)]
        cross = [("cross", i) for i in range(self.num_cross_decoder_layers)]
        return in_turn(own, cross) if self.layout == "interleaved" else own + cross
