"""What the models of all families share, with any head or none: inputs, caches, hidden states, loading."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, Cache, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from oncelm.cache.base import SequenceCache
from oncelm.models.checks import check_tokens, refuse_incomplete
from oncelm.models.extras import read_extras
from oncelm.models.family import Family
from oncelm.models.headless import Headless
from oncelm.models.inputs import Inputs, find_packing, read_inputs
from oncelm.models.layer_outputs import LayerOutputs
from oncelm.models.wanted import Keep, Wanted
from oncelm.utils.errors import check_whole


@dataclass(frozen=True)
class Pass:
    """What one forward pass reads.

    Attributes:
        tokens: ids [B, T], or embeddings [B, T, d].
        inputs: where they stand.
        cache: to read and extend; None without one.
        options: the family's own arguments, checked.
    """

    tokens: torch.Tensor
    inputs: Inputs
    cache: Any
    options: dict[str, Any]


class BaseModel(Family, PreTrainedModel):
    """A model that reads tokens into hidden states, with a cache of its own kind. Heads are subclasses.

    A family defines `__init__` (its modules, then `add_head`, then `post_init`), `new_cache` and `_states`. Weights are
    named alike in its models of all kinds, so that each loads what it needs of any other's folder.

    Attributes:
        cache_keys: keys of the configuration that a cache must agree in with the model.
        own_arguments: of `forward`, beside those of all families. `past`, where a family has it, holds what came before
            in place of a cache, and says its `lengths`.
        auto_model: the class of transformers that finds such models for a configuration.
        head_names: modules that come after the hidden states.
        family_heads: those of the family's other models too. In a folder, weights of other heads are passed over.
        has_new_head: whether the head may be missing in a folder: it is drawn then, and trained.
    """

    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _keys_to_ignore_on_load_unexpected: list[str] | None = None
    has_own_cache = True
    takes_host_inputs = True
    has_fused_loss = True
    cache_keys: tuple[str, ...]
    own_arguments: tuple[str, ...] = ()
    auto_model: Any = AutoModel
    head_names: tuple[str, ...] = ()
    family_heads: tuple[str, ...] = ()
    has_new_head = False
    new_cache: Callable[..., Any]  # (batch_size, max_tokens, dtype, ...)
    fingerprint: Callable[[], str]

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        others = [rf"^{name}\." for name in self.family_heads if name not in self.head_names]
        self._keys_to_ignore_on_load_unexpected = [*(type(self)._keys_to_ignore_on_load_unexpected or ()), *others]

    def add_head(self, config: PreTrainedConfig) -> None:
        """Make the modules behind the hidden states; a base model has none."""

    # -- for a family to define -----------------------------------------------------------------------------------

    def _states(self, given: Pass, wanted: Wanted) -> Iterator[tuple[slice, torch.Tensor]]:
        """Run the layers: (columns, final hidden states of the wanted positions in them), until all columns are read.

        The hidden states are [B, p, d], or packed [1, p, d] (see `Wanted`). A cache takes the tokens in.
        """
        raise NotImplementedError

    def _stack(self) -> list[nn.Module]:
        """The layers in the order of computation, and the norm behind them."""
        raise NotImplementedError

    def _makes_cache(self, own: dict[str, Any], is_packed: bool) -> bool:
        """Whether a pass with some of `own_arguments` may make a cache where nobody said.

        is_packed: sequences stand side by side in one row.
        """
        return True

    def _check_own(
        self,
        own: dict[str, Any],
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None,
        is_packed: bool,
        cache: Any,
        use_cache: bool,
    ) -> dict[str, Any]:
        """`Pass.options` of some of `own_arguments`; ValueError where they do not fit the rest of a pass.

        cache, use_cache: the one that is given, and whether one will be made.
        """
        return own

    # -- hidden states --------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: SequenceCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        positions_to_keep: Keep = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Final hidden states, behind the last norm. Arguments are those of the family's causal language model, but:

        Args:
            use_cache: return a cache; None means config.use_cache in evaluation without gradients.
            positions_to_keep: whose hidden states to return, as `logits_to_keep` says whose logits.

        Returns:
            BaseModelOutputWithPast with `last_hidden_state` [B, P, d] (zeros at padding; [number of True, d] for a
            mask), `past_key_values` and `hidden_states`.
        """
        own = self._take_own(kwargs)
        cu_seqlens, _ = read_extras(self, kwargs, cu_seqlens, None, output_attentions=output_attentions)
        given = self._read(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cu_seqlens, own,
            makes_cache=not torch.is_grad_enabled(),
        )  # fmt: skip
        everywhere = self._returns_hidden_states(output_hidden_states)
        wanted = Wanted(given.inputs, positions_to_keep, everywhere=everywhere)
        with torch.set_grad_enabled(torch.is_grad_enabled() and given.cache is None):
            _, layers = self._run(given, wanted)
            last = wanted.hidden()
        output = BaseModelOutputWithPast(last_hidden_state=last, past_key_values=given.cache, hidden_states=layers)
        return self._output(output, return_dict)

    def _run(
        self, given: Pass, wanted: Wanted, loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    ) -> tuple[torch.Tensor | None, tuple[torch.Tensor, ...] | None]:
        """Run the layers, which `wanted` then knows about.

        Args:
            loss: of hidden states [M, d] and their targets [M], summed.

        Returns:
            The whole loss; `hidden_states` where all positions are computed.
        """
        total = None
        recorded = LayerOutputs(self._stack(), given.inputs) if wanted.everywhere else None
        with recorded or nullcontext():
            for columns, hidden in self._states(given, wanted):
                if loss is not None:
                    part = loss(*wanted.learned(columns, hidden))
                    total = part if total is None else total + part
                wanted.keep(columns, hidden)
                if recorded is not None:
                    recorded.take(columns)
        return total, None if recorded is None else recorded.found()

    def _returns_hidden_states(self, asked: bool | None) -> bool:
        return bool(self.config.output_hidden_states if asked is None else asked)

    def _take_own(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The family's own arguments, those that are given, out of `kwargs`."""
        own = {name: kwargs.pop(name) for name in self.own_arguments if name in kwargs}
        return {name: value for name, value in own.items() if value is not None}

    def _read(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Any,
        inputs_embeds: torch.Tensor | None,
        use_cache: bool | None,
        cu_seqlens: torch.Tensor | None,
        own: dict[str, Any],
        makes_cache: bool,
    ) -> Pass:
        """Check what a forward pass is given, and make the cache that it wants.

        makes_cache: whether a cache is wanted in evaluation where `use_cache` is None and the configuration says so.
        """
        tokens = check_tokens(input_ids, inputs_embeds, self.config, self.cache_device)
        starts_anew = cache is None and own.get("past") is None
        position_ids, attention_mask, cu_seqlens = find_packing(
            tokens.shape, tokens.device, position_ids, attention_mask, cu_seqlens, starts_anew
        )
        is_packed = cu_seqlens is not None
        if use_cache is None:
            may = makes_cache and self.config.use_cache and not self.training
            use_cache = may and self._makes_cache(own, is_packed)
        options = self._check_own(own, tokens, attention_mask, is_packed, cache, use_cache)
        if cache is not None:
            self._check_cache(cache)
        elif use_cache:
            rows = tokens.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
            kinds = {name: options[name] for name in self.cache_options if options.get(name) is not None}
            cache = self.new_cache(max(rows, 1), **kinds)
        before = options.get("past") if cache is None else cache
        inputs = read_inputs(
            tokens.shape,
            tokens.device,
            attention_mask,
            cu_seqlens,
            None if before is None else before.lengths,
            0 if cache is None else cache.columns,
            position_ids,
        )
        return Pass(tokens, inputs, cache, options)

    def _output(self, output: Any, return_dict: bool | None) -> Any:
        """A forward pass's output, as a tuple where that is asked for."""
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    @property
    def base_model(self) -> nn.Module:
        """The model without its head: called as it is, it gives hidden states."""
        if not self.head_names:
            return self
        view = self.__dict__.get("_headless")
        if view is None:
            # no child: its modules would be found twice
            view = self.__dict__["_headless"] = Headless(partial(BaseModel.forward, self))
        view.look_at(self, self.head_names)
        return view

    def get_decoder(self, *args: Any, **kwargs: Any) -> nn.Module:
        return self.base_model

    # -- caches ---------------------------------------------------------------------------------------------------

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
        wanted, found = self._cache_settings(), cache.made_for
        if differing := [key for key in wanted if found.get(key) != wanted[key]]:
            # self_decoder of a hybrid is None, and tells less than its layer_types
            key = min(differing, key=lambda name: None in (found.get(name), wanted[name]))
            raise ValueError(
                f"the cache was made for a model with {key}={found.get(key)}, this one has {wanted[key]}: it "
                "belongs to another model."
            )

    @property
    def kv_dtype(self) -> torch.dtype:
        """The default dtype of keys and values in `new_cache`."""
        return self.dtype

    @property
    def cache_device(self) -> torch.device:
        """Where this model computes, so where its caches are: with offloaded weights not where those are kept."""
        device = self.device
        if device.type != "meta":
            return device
        hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
        devices = (getattr(hook, "execution_device", None) for hook in hooks)
        return torch.device(next((found for found in devices if found is not None), device))

    # -- places in a text to return to ------------------------------------------------------------------------------

    def mark(self, cache: Any) -> Any:
        """A place to return to with `rewind`, as often as needed, but never forward over an earlier one: a copy of the
        cache, or less where the family knows how."""
        return copy.deepcopy(cache)

    def rewind(self, cache: Any, mark: Any) -> Any:
        """The cache as it was at a mark; `cache` itself is of no use any more unless it is what is returned."""
        return copy.deepcopy(mark)

    def longest_whole(self, **read_options: Any) -> int | None:
        """Tokens of the longest text that gives the same in whatever parts it is read; None: any."""
        return None

    def reuse(self, cache: Any) -> Any | None:
        """The cache without its text, for another one; None where a new one has to be made."""
        return None

    def cache_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of the cache of one sequence of so many tokens; the model may be one without values (meta device)."""
        return self.new_cache(1, tokens, dtype).nbytes()

    # -- transformers' hooks --------------------------------------------------------------------------------------

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        """What came before reaches the layers through objects, and the reentrant variant loses the gradients of
        whatever is not an argument: it is refused, and not taken where nobody says which (torch's own default)."""
        run = gradient_checkpointing_func or checkpoint
        options = getattr(run, "keywords", {})
        if enable and options.get("use_reentrant"):
            raise ValueError("gradient checkpointing of OnceLM's models needs use_reentrant=False (the default here).")
        super()._set_gradient_checkpointing(enable, partial(run, use_reentrant=False), **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike | None, *args: Any, **kwargs: Any) -> Any:
        """As in Hugging Face, but a missing, unexpected or wrong-size tensor is an error, not a warning."""
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.setdefault("ignore_mismatched_sizes", True)  # they are listed in `info` instead, and refused below
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        new = [name for name in info["missing_keys"] if cls.has_new_head and name.split(".")[0] in cls.head_names]
        refuse_incomplete(pretrained_model_name_or_path, {**info, "missing_keys": set(info["missing_keys"]) - {*new}})
        return (model, info) if wants_info else model


def check_cache_size(batch_size: int, max_tokens: int | None) -> None:
    """ValueError unless a cache can have these sizes."""
    check_whole(1, batch_size=batch_size)
    if max_tokens is not None:
        check_whole(1, max_tokens=max_tokens)
