"""The configuration of a LongLLaMA model: LLaMA's, and what its memory layers need."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, LlamaConfig

from oncelm.models.llama import LLAMA, TRANSLATED
from oncelm.models.own_config import TRANSFORMERS_KEYS, OwnConfig, checked
from oncelm.utils.constraints import Constraint, Count, Each, OneOf, Only, Whole, check_all
from oncelm.utils.device import DTYPES
from oncelm.utils.errors import check_choice, shown

MEMORY_DTYPES = (*DTYPES, "int8")
LLAMA_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim"),
)
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
OLDER_KEYS = frozenset({*TRANSLATED, "gradient_checkpoint_every_ith", "torch_attention"})


class MemoryLayers(Constraint):
    """A list of layers; which there are is known once all keys are."""

    def check(self, name: str, value: Any) -> list[Any]:
        if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
            raise ValueError(f"{name} must be a list of layers, counted from 0, such as [8, 16]; got {shown(value)}.")
        return list(value)


@dataclass(frozen=True)
class HeadsAndQueries(Constraint):
    """How many of both memory layers process at once."""

    optional: bool = False

    def check(self, name: str, value: Any) -> list[int]:
        try:
            return Each(Whole(1), count=2)(name, value)
        except ValueError:
            raise ValueError(
                f"{name} must be (heads, queries), two whole numbers of at least 1, such as [4, 2048], or None; "
                f"got {shown(value)}."
            ) from None


@checked
@strict
class LongLlamaConfig(OwnConfig, LlamaConfig):
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
        ValueError: an unknown key (with the nearest known one), a value that its key cannot have, also when it is set
            later, or values that do not fit together. In a file, unknown keys that are like none of these are kept.
    """

    model_type = "longllama"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    constraints = {**LLAMA, "attention_dropout": Only(0, "LongLLaMA models have no dropout")}  # noqa: RUF012
    older_keys = OLDER_KEYS

    mem_layers: Annotated[list[int] | tuple[int, ...], MemoryLayers()] = ()
    mem_positionals: bool = True
    mem_dtype: Annotated[str | None, OneOf(MEMORY_DTYPES)] = "bfloat16"
    mem_attention_grouping: Annotated[list[int] | tuple[int, ...] | None, HeadsAndQueries()] = None
    last_context_length: Count | None = None
    cross_batch_range: Annotated[int | None, Whole(0)] = None
    cross_batch_stepping: bool = False
    dataset_packing: Count = 1

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_unknown(kwargs)
        check_all(kwargs, TRANSLATED)
        for key in OLDER_KEYS - TRANSLATED.keys():
            kwargs.pop(key, None)
        super().__post_init__(**kwargs)
        if self.last_context_length is None:
            self.last_context_length = max(1, min(1024, self.max_position_embeddings // 2))
        self._check(self.last_context_length)

    def _check(self, last_context_length: int) -> None:
        layers = self.num_hidden_layers
        for layer in self.mem_layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < layers:
                raise ValueError(f"mem_layers must be layers of the model, 0..{layers - 1}, got {self.mem_layers}.")
        if len(set(self.mem_layers)) != len(self.mem_layers):
            raise ValueError(f"mem_layers must not repeat a layer, got {self.mem_layers}.")
        self.mem_layers = sorted(self.mem_layers)  # one order, one fingerprint
        if not 1 <= last_context_length <= self.max_position_embeddings:
            raise ValueError(
                f"last_context_length must be from 1 to max_position_embeddings = {self.max_position_embeddings} "
                f"(the window), got {last_context_length}."
            )
        check_choice("rope_type", self.rope_parameters["rope_type"], ROPE_TYPES)
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
        """As for every configuration of OnceLM, and of a plain LLaMA; mem_layers must be the checkpoint's."""
        if config_dict.get("model_type") == LlamaConfig.model_type:
            config_dict = llama_settings(config_dict)
        check_mem_layers(config_dict.get("mem_layers"), kwargs.get("mem_layers"))
        return super().from_dict(config_dict, **kwargs)


def llama_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """A LLaMA model's config.json as a LongLLaMA's, memory in the model's own dtype."""
    known = {
        *LongLlamaConfig.own_keys(),
        *TRANSFORMERS_KEYS,
        *OLDER_KEYS,
        "dtype",
        "id2label",
        "label2id",
        "problem_type",
    }
    known -= {"architectures", "auto_map", *GenerationConfig._get_default_generation_params()}
    kept = {key: value for key, value in settings.items() if key in known}
    return {"mem_dtype": None, **kept, "model_type": LongLlamaConfig.model_type}


def check_mem_layers(trained: Any, asked: Any) -> None:
    """Refuse other memory layers than a LongLLaMA checkpoint was trained with."""
    if not trained or asked is None:
        return
    layers = MemoryLayers()
    trained, asked = layers("mem_layers", trained), layers("mem_layers", asked)
    if sorted(asked, key=str) != sorted(trained, key=str):  # by text: what is no number is refused, not compared
        raise ValueError(
            f"mem_layers {asked} are not the checkpoint's, which was trained with {trained}; leave them out."
        )
