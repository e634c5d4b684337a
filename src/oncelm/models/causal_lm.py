"""What the models have in common as Hugging Face causal language models whose caches are OnceLM's."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPast

from oncelm.cache.base import SequenceCache
from oncelm.models.checks import refuse_incomplete
from oncelm.models.family import Family
from oncelm.models.headless import Headless
from oncelm.utils.errors import check_whole, unknown


class CausalLM(Family, PreTrainedModel, GenerationMixin):
    """A causal language model with a cache of its own kind.

    Attributes:
        cache_keys: keys of the configuration that a cache must agree in with the model.
    """

    main_input_name = "input_ids"
    accepts_loss_kwargs = True  # Trainer then hands num_items_in_batch on: accumulated batches are one large batch
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    has_own_cache = True
    cache_keys: tuple[str, ...]
    new_cache: Callable[..., Any]  # (batch_size, max_tokens, dtype, ...)
    prefill: Callable[..., torch.Tensor]  # (input_ids [B, T], cache, ...) -> logits [B, V]
    fingerprint: Callable[[], str]

    def _cache_settings(self) -> dict[str, Any]:
        """What a cache of this model is made for."""
        return {key: getattr(self.config, key) for key in self.cache_keys}

    def _check_cache(self, cache: object) -> None:
        """ValueError unless `cache` was made by `new_cache` of a model of these sizes."""
        if not isinstance(cache, SequenceCache):
            prefix = "" if not isinstance(cache, Cache) else (
                " (Keys and values of every layer, as prefix tuning learns them, are not what this model keeps: use "
                "prompt tuning, p-tuning or LoRA.)"
            )  # fmt: skip
            raise ValueError(
                "past_key_values, and what prefill fills, must be a cache of this model: "
                f"model.new_cache(batch_size, max_tokens=...), got {type(cache).__name__}.{prefix}"
            )
        for key in self.cache_keys:
            made_for, wanted = cache.made_for.get(key), getattr(self.config, key)
            if made_for != wanted:
                raise ValueError(
                    f"the cache was made for a model with {key}={made_for}, this one has {wanted}: it belongs to "
                    "another model."
                )

    @property
    def cache_device(self) -> torch.device:
        """Where this model computes, so where its caches are: with offloaded weights not where those are kept."""
        if self.device.type != "meta":
            return self.device
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((device for device in devices if device is not None), self.device))

    # -- places in a text to return to ------------------------------------------------------------------------------

    def mark(self, cache: Any) -> Any:
        """A place to return to with `rewind`, as often as needed, but never forward over an earlier one: a copy of the
        cache, or less where the family knows how."""
        return copy.deepcopy(cache)

    def rewind(self, cache: Any, mark: Any) -> Any:
        """The cache as it was at a mark; `cache` itself is of no use any more unless it is what is returned."""
        return copy.deepcopy(mark)

    def reuse(self, cache: Any) -> Any | None:
        """The cache without its text, for another one; None where a new one has to be made."""
        return None

    # -- without the head -----------------------------------------------------------------------------------------

    @property
    def base_model(self) -> Headless:
        view = self.__dict__.get("_headless")
        if view is None:
            view = self.__dict__["_headless"] = Headless(self)  # no child: its modules would be found twice
        view.look_at(self)
        return view

    def get_decoder(self, *args: Any, **kwargs: Any) -> Headless:
        return self.base_model

    def hidden_states(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, **kwargs: Any
    ) -> BaseModelOutputWithPast | tuple:
        """Final hidden states [B, T, d] of all positions; arguments as in `forward`."""
        raise NotImplementedError

    def _output(self, output: Any, return_dict: bool | None) -> Any:
        """A forward pass's output, as a tuple where that is asked for."""
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    # -- transformers' hooks --------------------------------------------------------------------------------------

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        """Memories reach the layers through objects, and the reentrant variant loses the gradients of whatever is not
        an argument: it is refused, and not taken where nobody says which (torch's own default is the reentrant one)."""
        run = gradient_checkpointing_func or checkpoint
        options = getattr(run, "keywords", {})
        if enable and options.get("use_reentrant"):
            raise ValueError("gradient checkpointing of OnceLM's models needs use_reentrant=False (the default here).")
        super()._set_gradient_checkpointing(enable, partial(run, use_reentrant=False), **kwargs)

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict) -> None:
        """None: the model knows its tokens' places, and would have to check what generate says of them at each step."""

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
        mask = model_kwargs.get("attention_mask")
        if mask is not None and generation_config.is_assistant:
            # a draft that is the padding token is a token; generate, which made this mask of what it drafted, hides it
            mask = model_kwargs["attention_mask"] = mask.cummax(1).values
        if mask is not None and mask.dim() == 2 and not bool(mask[:, -1].all()):
            padded = (mask[:, -1] == 0).nonzero().flatten().tolist()
            raise ValueError(
                f"the prompt is padded on the right (attention_mask ends in 0 in row {padded[0]}), so generate would "
                "go on from padding. Pad on the left: tokenizer.padding_side = 'left'."
            )
        options = {name: model_kwargs[name] for name in self.cache_options if model_kwargs.get(name) is not None}
        if model_kwargs.get("past_key_values") is not None:
            self._check_cache(model_kwargs["past_key_values"])
            if options:
                raise ValueError(f"{', '.join(options)}: for the cache that generate makes; past_key_values is one.")
            generation_config.use_cache = True  # or every step would append the whole text again
            return
        if generation_config.use_cache is False:
            return
        rows = max(generation_config.num_beams, generation_config.num_return_sequences) * batch_size
        drafts = generation_mode == GenerationMode.ASSISTED_GENERATION  # they may run past the end before they are cut
        for name in options:
            del model_kwargs[name]  # said to this cache, and not again to each step
        cache = self.new_cache(rows, None if drafts else max_cache_length, **options)
        cache.max_tokens = None  # it has room for this call, and grows where a next turn (or PEFT's prompts) needs more
        if generation_config.is_assistant:  # a draft model's tokens are taken back when they are rejected
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

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
