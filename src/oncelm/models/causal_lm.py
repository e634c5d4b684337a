"""Every family's Hugging Face causal language model: logits, loss, generate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from oncelm.cache.base import SequenceCache
from oncelm.models.base import BaseModel
from oncelm.models.extras import one_of, read_extras, with_arguments_of
from oncelm.models.head import head_loss
from oncelm.models.inputs import NOTHING, check_hidden_past, read_targets
from oncelm.models.wanted import Keep, Wanted, is_nothing
from oncelm.utils.errors import unknown


class CausalLM(BaseModel, GenerationMixin):
    """A base model with a head that predicts the next token."""

    auto_model = AutoModelForCausalLM
    others: tuple[type[BaseModel], ...] = ()  # the family's models without this head
    prefill: Callable[..., torch.Tensor]  # (input_ids [B, T], cache, ...) -> logits [B, V]
    accepts_loss_kwargs = True  # Trainer then hands num_items_in_batch on: accumulated batches are one large batch

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: SequenceCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: Keep = None,
        cu_seqlens: torch.Tensor | None = None,
        num_items_in_batch: int | torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits, loss, or both, of the positions that they need.

        Args:
            input_ids: [B, T] token ids. Without padding, they, labels and cu_seqlens may be on the CPU while
                the model is on a GPU: they are checked there, and nothing waits for the GPU.
            attention_mask: [B, T], or [B, earlier + T] with a cache; 0 marks padding. Padding is left out of all
                computation; positions count real tokens.
            position_ids: [B or 1, T]; in one row of packed sequences each begins at 0. Otherwise they must be the
                tokens' places, which the model knows by itself.
            past_key_values: a cache from `new_cache` or an earlier call; the tokens are appended to it.
            inputs_embeds: [B, T, d] instead of input_ids (of a YOCO before scaling by sqrt(d)).
            labels: [B, T] targets as in Hugging Face: not shifted, -100 ignored. The loss is the mean over targets.
            use_cache: return a cache; None means config.use_cache in evaluation without labels. A pass with a cache
                computes no gradients.
            logits_to_keep: which logits to return: None or 0 all (with labels in training mode, None means none), n the
                last n columns, a vector the columns at these indices (an empty one: none), or a [B, T] mask of booleans
                (logits [number of True, V]).
            cu_seqlens: [N + 1] borders of N sequences packed into one row of input_ids.
            num_items_in_batch: divide the summed loss by this instead of the number of targets (gradient accumulation).
            targets: [B, T] labels that stand where they are predicted, for rows whose next token is elsewhere.
            output_attentions: not offered; True is refused.
            output_hidden_states: return the embeddings and each layer's output, all of them [B, T, d], the last behind
                the final norm. All layers then run on all positions, whatever `logits_to_keep` says.
            return_dict: False returns a tuple.
            kwargs: the family's own arguments (`own_arguments`), and what Hugging Face tools pass along:
                `cu_seq_lens_q` is cu_seqlens, `shift_labels` is targets; names that are no model's are refused.

        Returns:
            CausalLMOutputWithPast with `loss`, `logits` [B, P, V] (zeros at padding), `past_key_values` and
            `hidden_states`.

        Raises:
            ValueError: inputs that do not fit the model, the cache or each other; nothing has been changed then.
        """
        own = self._take_own(kwargs)
        cu_seqlens, targets = read_extras(self, kwargs, cu_seqlens, targets, output_attentions=output_attentions)
        has_loss = one_of(labels=labels, targets=targets) is not None
        everywhere = self._returns_hidden_states(output_hidden_states)
        is_plain = not (has_loss or everywhere or own or cu_seqlens is not None)
        if is_plain and past_key_values is not None and input_ids is not None:
            logits = self._quick_step(input_ids, attention_mask, position_ids, past_key_values, logits_to_keep)
            if logits is not None:
                return self._output(CausalLMOutputWithPast(logits=logits, past_key_values=past_key_values), return_dict)
        given = self._read(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, cu_seqlens, own,
            makes_cache=not has_loss,
        )  # fmt: skip
        if has_loss:
            targets = read_targets(labels, targets, given.inputs, given.tokens.shape, self.config.vocab_size)
            logits_to_keep = NOTHING if is_nothing(logits_to_keep, self.training) else logits_to_keep
        wanted = Wanted(given.inputs, logits_to_keep, targets, self.config.vocab_size, everywhere)
        head = self.get_output_embeddings()
        # a cache holds values, not graphs: with gradients on, the earlier tokens' share would be missing silently
        with torch.set_grad_enabled(torch.is_grad_enabled() and given.cache is None):
            loss, layers = self._run(given, wanted, partial(head_loss, head) if has_loss else None)
            if loss is not None:
                loss = loss / (max(wanted.num_targets, 1) if num_items_in_batch is None else num_items_in_batch)
            kept = wanted.hidden()
            logits = None if kept is None else head(kept)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=given.cache, hidden_states=layers)
        return self._output(output, return_dict)

    def _quick_step(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: SequenceCache,
        logits_to_keep: Keep,
    ) -> torch.Tensor | None:
        """Logits [B, 1, V] where a family has a quicker way for one new token a sequence, and this pass is that."""
        return None

    # -- generate -------------------------------------------------------------------------------------------------

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict) -> None:
        """None: the model knows its tokens' places, and would have to check what generate says of them at each step."""

    @with_arguments_of(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As in Hugging Face, but that the mask of one more token a row is left out: generate makes it of ones, and to
        read it a GPU would be waited for at every step."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        cache, ids, mask = (inputs.get(name) for name in ("past_key_values", "input_ids", "attention_mask"))
        is_step = isinstance(cache, SequenceCache) and ids is not None and ids.shape[1] == 1
        if is_step and mask is not None and mask.shape == (len(ids), cache.columns + 1):
            del inputs["attention_mask"]
        return inputs

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
            cache = model_kwargs["past_key_values"]
            self._check_cache(cache)
            if mask is not None and mask.shape == (len(cache.lengths), cache.columns + 1):
                check_hidden_past(mask[:, :-1], cache.lengths)  # no forward pass will see it
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
