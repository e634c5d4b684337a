"""A causal language model without its head, for tools that bring a loss of their own (TRL, contrastive training)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPast

if TYPE_CHECKING:
    from oncelm.models.causal_lm import CausalLM


class Headless(nn.Module):
    """What `model.base_model` is: called as the model is, it gives hidden states.

    Its modules are the model's own without the head, so that freezing it, say, freezes them.
    """

    _tp_plan = _pp_plan = None  # transformers asks its base models for plans of parallel layers

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self._hidden_states = model.hidden_states
        self.look_at(model)

    def look_at(self, model: CausalLM) -> None:
        """Take the model's modules as they are now: tools exchange them."""
        head = model.get_output_embeddings()
        self._modules = {name: module for name, module in model.named_children() if module is not head}
        self.training = model.training

    def forward(
        self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> BaseModelOutputWithPast | tuple:
        """`last_hidden_state` [B, T, d] behind the final norm, zeros at padding; arguments are those of the model's own
        forward pass, without labels and logits_to_keep."""
        return self._hidden_states(input_ids, attention_mask, **kwargs)
