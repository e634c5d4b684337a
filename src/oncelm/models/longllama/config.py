"""The configuration of a LongLLaMA model: LLaMA's, and what its memory layers need."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, LlamaConfig
from transformers.activations import ACT2FN

from oncelm.models.yoco.config import _TRANSFORMERS_KEYS
from oncelm.utils.device import DTYPES
from oncelm.utils.errors import check_choice, check_whole, unknown

MEMORY_DTYPES = (*DTYPES, "int8")
LLAMA_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
# Keys of LLaMA's older configurations and of the official LongLLaMA folders that mean nothing here, or are translated.
_OLDER_KEYS = {
    "rope_theta",
    "rope_scaling",
    "partial_rotary_factor",
    "gradient_checkpoint_every_ith",
    "torch_attention",
}


@strict
class LongLlamaConfig(LlamaConfig):
    """LongLLaMA (Focused Transformer, arXiv 2307.03170): all of LLaMA's keys, and these.

    `max_position_embeddings` is the window: the longest local context. Longer input is cut into windows.

    Args:
        mem_layers: indices of the memory layers, which also attend to all that came before the window; kept in order.
        mem_positionals: rotate queries and keys in memory layers.
        mem_dtype: dtype of keys and values in memory, "int8" too; None means the model's.
        mem_attention_grouping: (heads, queries) that memory layers process at once, to save memory; None means all.
        last_context_length: tokens at the end of the input that are not loaded into memory but kept as the local
            cache of decoding; None means half a window, 1024 at most.
        cross_batch_range, cross_batch_stepping, dataset_packing: crossbatch training (`oncelm.ops.crossbatch`): rows of
            a batch that a row sees in memory layers in training mode. Range None or 0: no crossbatch.

    Raises:
        ValueError: an unknown key (with the nearest known one), or values that do not fit together.
    """

    model_type = "longllama"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    mem_layers: list[int] | tuple[int, ...] = ()
    mem_positionals: bool = True
    mem_dtype: str | None = "bfloat16"
    mem_attention_grouping: list[int] | tuple[int, ...] | None = None
    last_context_length: int | None = None
    cross_batch_range: int | None = None
    cross_batch_stepping: bool = False
    dataset_packing: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        for key in kwargs:
            if key not in _TRANSFORMERS_KEYS | _OLDER_KEYS:
                raise unknown("LongLlamaConfig key", key, self.own_keys())
        for key in _OLDER_KEYS - {"rope_theta", "rope_scaling", "partial_rotary_factor"}:
            kwargs.pop(key, None)
        self.mem_layers = _layer_list(self.mem_layers)
        if self.mem_attention_grouping is not None:
            self.mem_attention_grouping = _heads_and_queries(self.mem_attention_grouping)
        check_llama_keys(vars(self))  # before LLaMA's own code divides by them
        super().__post_init__(**kwargs)
        check_whole(1, max_position_embeddings=self.max_position_embeddings)
        if self.last_context_length is None:
            self.last_context_length = max(1, min(1024, self.max_position_embeddings // 2))
        self._check(self.last_context_length)

    @classmethod
    def own_keys(cls) -> list[str]:
        """The keys described above and LLaMA's."""
        skipped = {entry.name for entry in dataclasses.fields(LlamaConfig.__mro__[1])}
        return [entry.name for entry in dataclasses.fields(cls) if entry.name not in skipped]

    def _check(self, last_context_length: int) -> None:
        layers = self.num_hidden_layers
        for layer in self.mem_layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < layers:
                raise ValueError(f"mem_layers must be layers of the model, 0..{layers - 1}, got {self.mem_layers}.")
        if len(set(self.mem_layers)) != len(self.mem_layers):
            raise ValueError(f"mem_layers must not repeat a layer, got {self.mem_layers}.")
        self.mem_layers = sorted(self.mem_layers)  # one order, one fingerprint
        if self.mem_dtype is not None:
            check_choice("mem_dtype", self.mem_dtype, MEMORY_DTYPES)
        for name in ("mem_positionals", "cross_batch_stepping"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}.")
        check_whole(1, last_context_length=last_context_length, dataset_packing=self.dataset_packing)
        if not 1 <= last_context_length <= self.max_position_embeddings:
            raise ValueError(
                f"last_context_length must be from 1 to max_position_embeddings = {self.max_position_embeddings} "
                f"(the window), got {last_context_length}."
            )
        if self.cross_batch_range is not None:
            check_whole(0, cross_batch_range=self.cross_batch_range)
        check_choice("rope_type", self.rope_parameters["rope_type"], ROPE_TYPES)
        if self.attention_dropout:
            raise ValueError(f"attention_dropout is not offered by LongLLaMA models, got {self.attention_dropout}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}."
            )

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """A folder's config.json; that of a LLaMA-family model as a LongLLaMA's, the caller to give `mem_layers`."""
        settings, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if settings.get("model_type") == LlamaConfig.model_type:
            settings = llama_settings(settings)
        return settings, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Hugging Face, but keys given beside the dict are checked too; mem_layers must be the checkpoint's."""
        given = {key: kwargs.pop(key) for key in cls.own_keys() if key in kwargs}
        check_mem_layers(config_dict.get("mem_layers"), given.get("mem_layers"))
        return super().from_dict({**config_dict, **given}, **kwargs)


def check_llama_keys(settings: Mapping[str, Any]) -> None:
    """Raise ValueError naming the first key whose value no LLaMA can have; one that is absent or None has a default."""
    check_whole(1, **{name: settings[name] for name in LLAMA_SIZES if settings.get(name) is not None})
    if settings.get("hidden_act") is not None:
        check_choice("hidden_act", settings["hidden_act"], ACT2FN)


def llama_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """A LLaMA model's config.json as a LongLLaMA's, memory in the model's own dtype."""
    known = {*LongLlamaConfig.own_keys(), *_TRANSFORMERS_KEYS, *_OLDER_KEYS, "dtype"}
    known -= {"architectures", "auto_map", *GenerationConfig._get_default_generation_params()}
    kept = {key: value for key, value in settings.items() if key in known}
    return {"mem_dtype": None, **kept, "model_type": LongLlamaConfig.model_type}


def check_mem_layers(trained: Any, asked: Any) -> None:
    """Refuse other memory layers than a LongLLaMA checkpoint was trained with."""
    if not trained or asked is None:
        return
    trained, asked = _layer_list(trained), _layer_list(asked)
    if sorted(asked, key=str) != sorted(trained, key=str):  # by text: what is no number is refused, not compared
        raise ValueError(
            f"mem_layers {asked} are not the checkpoint's, which was trained with {trained}; leave them out."
        )


def _layer_list(mem_layers: Any) -> list[Any]:
    if isinstance(mem_layers, str) or not isinstance(mem_layers, Iterable):
        raise ValueError(f"mem_layers must be a list of layers, counted from 0, such as [8, 16]; got {mem_layers!r}.")
    return list(mem_layers)


def _heads_and_queries(grouping: Any) -> list[int]:
    pair = isinstance(grouping, list | tuple) and len(grouping) == 2
    if not pair or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in grouping):
        raise ValueError(
            "mem_attention_grouping must be (heads, queries), two whole numbers of at least 1, such as [4, 2048], or "
            f"None; got {grouping!r}."
        )
    return list(grouping)
