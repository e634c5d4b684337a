"""What the models have in common as Hugging Face causal language models whose caches are OnceLM's."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from oncelm.cache.sequence_cache import SequenceCache
from oncelm.models.checks import refuse_incomplete
from oncelm.utils.errors import check_whole, unknown


class CausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model with a cache of its own kind.

    Attributes:
        cache_keys: keys of the configuration that a cache must agree in with the model.
    """

    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    cache_keys: tuple[str, ...]
    new_cache: Callable[..., Any]  # (batch_size, max_tokens, ...)

    def _cache_settings(self) -> dict[str, Any]:
        """What a cache of this model is made for."""
        return {key: getattr(self.config, key) for key in self.cache_keys}

    def _check_cache(self, cache: object) -> None:
        """ValueError unless `cache` was made by `new_cache` of a model of these sizes."""
        if not isinstance(cache, SequenceCache):
            raise ValueError(
                "past_key_values, and what prefill fills, must be a cache of this model: "
                f"model.new_cache(batch_size, max_tokens=...), got {type(cache).__name__}."
            )
        for key in self.cache_keys:
            made_for, wanted = cache.made_for.get(key), getattr(self.config, key)
            if made_for != wanted:
                raise ValueError(
                    f"the cache was made for a model with {key}={made_for}, this one has {wanted}: it belongs to "
                    "another model."
                )

    # -- transformers' hooks --------------------------------------------------------------------------------------

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        """Memories reach the layers through objects, and the reentrant variant loses the gradients of whatever is not
        an argument: it is refused."""
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and options.get("use_reentrant"):
            raise ValueError("gradient checkpointing of OnceLM's models needs use_reentrant=False (the default here).")
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """generate's hook: a preallocated cache of the length that the generation needs."""
        if generation_config.cache_implementation not in (None, "static", "dynamic"):
            raise unknown("cache_implementation", generation_config.cache_implementation, ["static", "dynamic"])
        if generation_config.assistant_early_exit is not None:
            raise ValueError("assistant_early_exit is for models whose layers may be left out; these may not.")
        if model_kwargs.get("past_key_values") is not None:
            self._check_cache(model_kwargs["past_key_values"])
            return
        if generation_config.use_cache is False:
            return
        rows = max(generation_config.num_beams, generation_config.num_return_sequences) * batch_size
        drafts = generation_mode == GenerationMode.ASSISTED_GENERATION  # they may run past the end before they are cut
        cache = self._generation_cache(rows, None if drafts else max_cache_length, model_kwargs)
        if generation_config.is_assistant:  # a draft model's tokens are taken back when they are rejected
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    def _generation_cache(self, batch_size: int, max_tokens: int | None, model_kwargs: dict) -> Any:
        return self.new_cache(batch_size, max_tokens)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """As in Hugging Face, but a missing, unexpected or wrong-size tensor is an error, not a warning."""
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("ignore_mismatched_sizes", True)  # they are listed in `info` instead, and refused below
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        refuse_incomplete(pretrained_model_name_or_path, info)
        return (model, info) if wants_info else model


def check_cache_size(batch_size: int, max_tokens: int | None) -> None:
    """ValueError unless a cache can have these sizes."""
    check_whole(1, batch_size=batch_size)
    if max_tokens is not None:
        check_whole(1, max_tokens=max_tokens)


def refuse_outputs(model: str, **outputs: bool | None) -> None:
    """ValueError for what Hugging Face models can return and these cannot."""
    for name, value in outputs.items():
        if value:
            raise ValueError(f"{name}=True is not offered by {model} models.")
