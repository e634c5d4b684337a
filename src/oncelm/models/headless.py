"""A causal language model without its head, for tools that bring a loss of their own (TRL, contrastive training)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

if TYPE_CHECKING:
    from oncelm.models.causal_lm import CausalLM


class Headless(nn.Module):
    """What `model.base_model` is: called as the model is, it gives hidden states.

    It holds no parameters: embeddings, layers and final norm are the model's own, under the model's names.
    """

    _tp_plan = _pp_plan = None  # transformers asks its base models for plans of parallel layers

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self._hidden_states = model.hidden_states  # a method, no child: its parameters would be found twice
        self.train(model.training)

    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> BaseModelOutputWithPast:
        """`last_hidden_state` [B, T, d] behind the final norm, zeros at padding; arguments are those of the model's own
        forward pass, without labels and logits_to_keep."""
        return self._hidden_states(input_ids, attention_mask, **kwargs)
